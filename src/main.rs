//! The `upcycle` binary: parses the command line and reports errors. Everything it does is in `cli/` and the library.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
