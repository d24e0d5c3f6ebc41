//! `upcycle completions`: shell completions on stdout.

use clap_complete::Shell;

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell
    shell: Shell,
}

pub(crate) fn run(args: &Args) {
    clap_complete::generate(args.shell, &mut super::command(), "upcycle", &mut std::io::stdout());
}
