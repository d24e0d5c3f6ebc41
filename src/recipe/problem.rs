//! A mistake or a doubt about a recipe, shown at its place. Nothing is printed here.

use std::{fmt, ops::Range, path::PathBuf, sync::Arc};

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};

/// The file that a problem is in.
#[derive(Debug)]
pub(super) struct File {
    pub(super) path: PathBuf,
    pub(super) text: String,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The recipe cannot be used.
    Error,
    /// It can, but the result may not be what was wanted.
    Warning,
}

/// What is wrong, where, and what to do. [`Display`](fmt::Display) is plain text, [`Problem::styled`] is for terminals.
#[derive(Debug, Clone)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// The name of the [lint](super::Lint) that found it.
    pub lint: Option<&'static str>,
    /// One line.
    pub message: String,
    /// Why it matters.
    pub about: Option<&'static str>,
    /// What to do about it.
    pub hint: Option<String>,
    pub(super) places: Vec<Place>,
    pub(super) file: Arc<File>,
}

/// A stretch of the recipe with a word on it; the first of a problem is the one that counts.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) span: Range<usize>,
    pub(super) label: String,
}

impl Problem {
    /// Line and column of the problem, both from 1; the column counts characters.
    pub fn position(&self) -> (usize, usize) {
        let before = &self.file.text[..self.places.first().map_or(0, |place| place.span.start)];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
    }

    /// The message with its severity, its lines of the recipe, carets and hint, coloured by ANSI escapes.
    pub fn styled(&self) -> String {
        self.render(&Renderer::styled(), self.level())
    }

    fn level(&self) -> Level<'static> {
        match self.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        }
    }

    fn render(&self, renderer: &Renderer, level: Level<'_>) -> String {
        let annotations = self.places.iter().enumerate().map(|(i, place)| {
            let kind = if i == 0 { AnnotationKind::Primary } else { AnnotationKind::Context };
            let annotation = kind.span(place.span.clone());
            if place.label.is_empty() { annotation } else { annotation.label(place.label.as_str()) }
        });
        let path = self.file.path.to_string_lossy();
        let snippet = Snippet::source(self.file.text.as_str()).path(path.as_ref()).annotations(annotations);
        let title = level.primary_title(self.message.as_str());
        let title = match self.lint {
            Some(lint) => title.id(lint),
            None => title,
        };
        let about = self.about.map(|about| Level::NOTE.message(about));
        let mut report = vec![title.element(snippet).elements(about)];
        if let Some(hint) = &self.hint {
            report.push(Group::with_title(Level::HELP.with_name("hint").secondary_title(hint.as_str())));
        }
        renderer.render(&report)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(&Renderer::plain(), self.level()))
    }
}
