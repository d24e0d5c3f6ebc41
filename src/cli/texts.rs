//! Texts of several domains on the command line, for the commands that read them.

use std::path::{Path, PathBuf};

use anyhow::bail;
use upcycle::{
    engine::tokenizer::{Specials, Tokenizer},
    inspect::{
        evaluate::{self, Text},
        perplexity,
    },
};

/// Which texts, and how much of them.
#[derive(Debug, clap::Args)]
pub(crate) struct TextArgs {
    /// A text of one domain, best held out from all training (repeatable); name it after its expert
    #[arg(long = "text", value_name = "DOMAIN=FILE", value_parser = named_file)]
    pub(crate) texts: Vec<NamedFile>,
    /// Tokens read in one piece
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) window: u32,
    /// Pieces of each text, spread evenly over it
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) windows: u32,
}

/// A text and its domain's name.
#[derive(Debug, Clone)]
pub(crate) struct NamedFile {
    pub(crate) name: String,
    pub(crate) file: PathBuf,
}

/// `NAME=FILE`, or `FILE`, whose name without its ending then names the domain.
pub(crate) fn named_file(text: &str) -> Result<NamedFile, String> {
    let (name, file) = match text.split_once('=') {
        Some((name, file)) => (name.trim().to_owned(), PathBuf::from(file)),
        None => (Path::new(text).file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default(), PathBuf::from(text)),
    };
    if name.is_empty() || file.as_os_str().is_empty() { Err("write DOMAIN=FILE".into()) } else { Ok(NamedFile { name, file }) }
}

impl TextArgs {
    /// Names and files.
    pub(crate) fn named(&self) -> anyhow::Result<Vec<(&str, &Path)>> {
        let mut named: Vec<(&str, &Path)> = Vec::new();
        for NamedFile { name, file } in &self.texts {
            if named.iter().any(|(other, _)| other == name) {
                bail!("there are two texts named `{name}`: join the files, or name them apart (`--text NAME=FILE`)");
            }
            named.push((name, file));
        }
        Ok(named)
    }

    /// Names and contents.
    pub(crate) fn read(&self) -> anyhow::Result<Vec<(String, String)>> {
        self.named()?.into_iter().map(|(name, file)| Ok((name.to_owned(), fs_err::read_to_string(file)?))).collect()
    }

    /// The windows of each text in a model's tokens.
    pub(crate) fn cut(&self, texts: &[(String, String)], tokenizer: &Tokenizer) -> anyhow::Result<Vec<Text>> {
        let prefix: Vec<u32> = tokenizer.prefix()?.into_iter().collect();
        let cut = |(name, text): &(String, String)| {
            let tokens = tokenizer.encode(text, Specials::Written)?;
            let windows = perplexity::windows(&tokens, &prefix, self.window as usize, self.windows as usize);
            if windows.is_empty() {
                let (found, window) = (tokens.len(), self.window);
                bail!("text `{name}` has {found} tokens, too few for a window of {window}: give more text, or a smaller `--window`");
            }
            Ok(Text { name: name.clone(), windows, expert: None })
        };
        texts.iter().map(cut).collect()
    }
}

/// Finds out which expert each text belongs to; the note says so if that was guessed.
pub(crate) fn assign(texts: &mut [Text], experts: &[String]) -> Option<String> {
    let (matched, note) = matched(&texts.iter().map(|text| text.name.as_str()).collect::<Vec<_>>(), experts);
    texts.iter_mut().zip(matched).for_each(|(text, expert)| text.expert = expert);
    note
}

/// The expert of each domain; the note says so if that was guessed.
pub(crate) fn matched(domains: &[&str], experts: &[String]) -> (Vec<Option<usize>>, Option<String>) {
    let (matched, by_order) = evaluate::match_experts(domains, experts);
    let pairs: Vec<String> = domains.iter().zip(experts).map(|(domain, expert)| format!("`{domain}` to `{expert}`")).collect();
    let note = by_order.then(|| format!("no text is named after an expert, so they were assigned in their order: {}", pairs.join(", ")));
    (matched, note)
}
