//! Options of `serve` from three places: the command line wins over environment variables, and those over a file.
//!
//! A file's values become the options' defaults, so that clap checks them like any others.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use clap::{Arg, ArgAction, Command};
use serde_json::Value;
use upcycle::env;

/// The command whose options these are.
const COMMAND: &str = "serve";

/// The option that names the file.
const FILE: &str = "config";

/// The key of a file that stands for what is no option on the command line.
const MODELS: &str = "model";

/// The command line's grammar with what the environment and the file of these arguments say.
pub(crate) fn command(command: Command, arguments: &[OsString]) -> anyhow::Result<Command> {
    let command = command.mut_subcommand(COMMAND, |serve| serve.mut_args(variable));
    let Some(file) = file(&command, arguments) else { return Ok(command) };
    let text = fs_err::read_to_string(&file)?;
    let Some(serve) = command.find_subcommand(COMMAND) else { return Ok(command) };
    let values = values(serve, &file, &text)?;
    Ok(command.mut_subcommand(COMMAND, |serve| {
        serve.mut_args(|arg| match key(&arg).and_then(|key| values.get(&key)) {
            Some(values) => arg.required(false).default_values(values),
            None => arg,
        })
    }))
}

/// Lets an option be given as a variable.
fn variable(arg: Arg) -> Arg {
    match arg.get_long() {
        Some(long) => {
            let name = env::option(long);
            arg.env(name).hide_env_values(true)
        }
        None => arg,
    }
}

/// What a file calls an option; none for what it cannot say.
fn key(arg: &Arg) -> Option<String> {
    match arg.get_long() {
        Some(FILE | "help" | "version") => None,
        Some(long) => Some(long.to_owned()),
        None => Some(arg.get_id().to_string()),
    }
}

/// The file that the arguments name. What else may be wrong with them is said later.
fn file(command: &Command, arguments: &[OsString]) -> Option<PathBuf> {
    let matches = command.clone().ignore_errors(true).try_get_matches_from(arguments).ok()?;
    matches.subcommand_matches(COMMAND)?.get_one(FILE).cloned()
}

/// A file's values by the option's name.
fn values(serve: &Command, file: &Path, text: &str) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
    let file = file.display();
    let read: BTreeMap<String, Value> = serde_saphyr::from_str(text).with_context(|| format!("{file} is no YAML map of options"))?;
    let args: BTreeMap<String, &Arg> = serve.get_arguments().filter_map(|arg| Some((key(arg)?, arg))).collect();
    let mut values = BTreeMap::new();
    for (name, value) in read {
        let name = name.replace('_', "-");
        let Some(arg) = args.get(&name) else {
            let closest =
                args.keys().map(|known| (strsim::normalized_damerau_levenshtein(&name, known), known)).max_by(|a, b| a.0.total_cmp(&b.0));
            let meant = closest.filter(|(alike, _)| *alike > 0.6).map_or(String::new(), |(_, known)| format!("did you mean `{known}`? "));
            let known: Vec<String> = args.keys().map(|key| format!("`{key}`")).collect();
            bail!("{file}: unknown key `{name}`; {meant}There are {}", known.join(", "));
        };
        let one = |value: &Value| match value {
            Value::String(text) => Ok(text.clone()),
            Value::Number(_) | Value::Bool(_) => Ok(value.to_string()),
            _ => bail!("{file}: `{name}` must be text, a number, true or false{}", if many(arg) { ", or a list of such" } else { "" }),
        };
        let all = match value {
            Value::Array(all) if many(arg) => all.iter().map(one).collect::<anyhow::Result<_>>()?,
            value => vec![one(&value)?],
        };
        values.insert(name, all);
    }
    Ok(values)
}

/// Whether an option may have several values.
fn many(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append) || arg.get_id() == MODELS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grammar() -> Command {
        let serve = Command::new(COMMAND)
            .arg(Arg::new(MODELS).required(true).num_args(1..))
            .arg(Arg::new("port").long("port").default_value("8080"))
            .arg(Arg::new("api-key").long("api-key").action(ArgAction::Append))
            .arg(Arg::new("log-prompts").long("log-prompts").action(ArgAction::SetTrue))
            .arg(Arg::new(FILE).long(FILE).value_parser(clap::value_parser!(PathBuf)));
        Command::new("upcycle").subcommand(serve)
    }

    fn parse(text: &str, arguments: &[&str]) -> anyhow::Result<clap::ArgMatches> {
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("serve.yml");
        fs_err::write(&file, text)?;
        let file = file.to_string_lossy();
        let arguments: Vec<OsString> =
            ["upcycle", COMMAND].iter().chain(arguments).copied().chain(["--config", &*file]).map(Into::into).collect();
        let mut matches = command(grammar(), &arguments)?.try_get_matches_from(arguments)?;
        Ok(matches.remove_subcommand().unwrap().1)
    }

    #[test]
    fn a_file_gives_what_the_command_line_does_not() {
        let text = "model: [a, b=c]\nport: 9000\napi_key: [one, two]\nlog-prompts: true\n";
        let found = parse(text, &[]).unwrap();
        let all = |found: &clap::ArgMatches, id: &str| found.get_many::<String>(id).unwrap().cloned().collect::<Vec<_>>();
        assert_eq!((all(&found, MODELS), all(&found, "api-key")), (vec!["a".into(), "b=c".into()], vec!["one".into(), "two".into()]));
        assert_eq!((all(&found, "port"), found.get_flag("log-prompts")), (vec!["9000".to_owned()], true));
        let found = parse(text, &["d", "--port", "1"]).unwrap();
        assert_eq!((all(&found, MODELS), all(&found, "port")), (vec!["d".to_owned()], vec!["1".to_owned()]));
    }

    #[test]
    fn mistakes_in_a_file_are_named() {
        for (text, expected) in [
            ("prot: 1", "unknown key `prot`; did you mean `port`? There are `api-key`, `log-prompts`, `model`, `port`"),
            ("zebra: 1", "unknown key `zebra`; There are `api-key`"),
            ("port: [1, 2]", "`port` must be text, a number, true or false"),
            ("api-key: {a: 1}", "`api-key` must be text, a number, true or false, or a list of such"),
            ("port", "is no YAML map of options"),
        ] {
            let error = parse(text, &["m"]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(parse("port: 1", &[]).is_err(), "no model");
    }
}
