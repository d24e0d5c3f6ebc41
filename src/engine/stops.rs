//! Stop strings in a text that comes in pieces: nothing of them gets out, even when they are spread over many pieces.

/// Watches a text for stop strings.
#[derive(Debug)]
pub struct Stops {
    stops: Vec<String>,
    /// text that may be the beginning of a stop string
    held: String,
}

/// What may be shown after a piece of text.
#[derive(Debug, PartialEq, Eq)]
pub enum Shown {
    /// This much, and there may be more.
    More(String),
    /// This much; then a stop string came.
    Last(String),
}

impl Stops {
    /// Watches for these strings; empty ones are ignored.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new() }
    }

    /// Takes a piece of text.
    pub fn push(&mut self, piece: &str) -> Shown {
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop)).min() {
            self.held.truncate(at);
            return Shown::Last(std::mem::take(&mut self.held));
        }
        // A stop string may begin at any character from which all the rest is its beginning.
        let may_begin = |&(at, _): &(usize, char)| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..]));
        let safe = self.held.char_indices().find(may_begin).map_or(self.held.len(), |(at, _)| at);
        let held = self.held.split_off(safe);
        Shown::More(std::mem::replace(&mut self.held, held))
    }

    /// What is held back, when no more text comes; nothing after a stop string.
    pub fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut watch = Stops::new(stops.iter().map(|&s| s.to_owned()).collect());
        let mut shown = Vec::new();
        for piece in pieces {
            match watch.push(piece) {
                Shown::More(text) => shown.push(text),
                Shown::Last(text) => {
                    shown.push(text);
                    return (shown, true);
                }
            }
        }
        shown.push(watch.rest());
        (shown, false)
    }

    #[test]
    fn a_stop_string_over_three_pieces_never_shows() {
        assert_eq!(run(&["\nUser:"], &["Hi\n", "Us", "er: x"]), (vec!["Hi".into(), String::new(), String::new()], true));
    }

    #[test]
    fn a_beginning_that_leads_nowhere_is_shown_late() {
        assert_eq!(run(&["aab"], &["a", "a", "a", "c"]).0, ["", "", "a", "aac", ""]);
        assert_eq!(run(&["END"], &["the E"]), (vec!["the ".into(), "E".into()], false));
    }

    #[test]
    fn the_earliest_of_several_counts_and_empty_ones_do_not() {
        assert_eq!(run(&["", "cd", "b"], &["abcd"]), (vec!["a".into()], true));
        assert_eq!(run(&[], &["é", "b"]), (vec!["é".into(), "b".into(), String::new()], false));
    }

    proptest! {
        #[test]
        fn any_split_gives_the_text_up_to_the_stop(text in "[abé]{0,24}", stops in prop::collection::vec("[abé]{1,4}", 0..3), cuts in prop::collection::vec(0usize..24, 0..6)) {
            let mut borders: Vec<usize> = cuts.into_iter().filter(|&cut| text.is_char_boundary(cut)).chain([0, text.len()]).collect();
            borders.sort_unstable();
            let pieces: Vec<&str> = borders.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let (shown, stopped) = run(&stops, &pieces);
            let shown = shown.concat();
            prop_assert_eq!(stopped, stops.iter().any(|stop| text.contains(stop)));
            prop_assert!(stops.iter().all(|stop| !shown.contains(stop)));
            if stopped {
                // Where two stop strings overlap, the one that is complete first may win: it depends on the pieces.
                let rest = text.strip_prefix(&shown).unwrap();
                prop_assert!(stops.iter().any(|stop| rest.starts_with(stop)), "{} | {}", shown, rest);
            } else {
                prop_assert_eq!(shown, text);
            }
        }
    }
}
