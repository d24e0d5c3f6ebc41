//! Another expert in a recipe, one in place of another, or one less. What else the recipe says stays; its comments and its layout do not.

use serde_json::{Map, Value, json};

/// A change to a recipe's experts, which are numbered from 0.
#[derive(Debug, Clone)]
pub enum Change {
    /// One more, behind the others.
    Add(NewExpert),
    /// Another model in place of an expert's; its prompts and its text where they are given, else those of the expert.
    Replace(usize, NewExpert),
    /// One less.
    Remove(usize),
}

/// What is said of an expert on the command line.
#[derive(Debug, Clone)]
pub struct NewExpert {
    /// Where it is.
    pub source_model: String,
    /// What it is for.
    pub positive_prompts: Vec<String>,
    /// A file of such prompts.
    pub prompts_file: Option<String>,
    /// Text of its kind.
    pub text_file: Option<String>,
}

/// Why a recipe's experts cannot be changed.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// It is no recipe.
    #[error("the recipe cannot be read: {0}")]
    Yaml(String),
    /// There is no list, or not so many.
    #[error("the recipe has no expert {0}")]
    NoExpert(usize),
}

/// The recipe's text with the change.
pub fn edit(text: &str, change: &Change) -> Result<String, EditError> {
    let mut recipe = read(text)?;
    let Some(Value::Array(experts)) = recipe.get_mut("experts") else { return Err(EditError::Yaml("it has no list of `experts`".into())) };
    match change {
        Change::Add(new) => experts.push(described(Map::new(), new)),
        Change::Replace(e, new) => match experts.get_mut(*e) {
            Some(old) => *old = described(old.as_object().cloned().unwrap_or_default(), new),
            None => return Err(EditError::NoExpert(*e)),
        },
        Change::Remove(e) if *e < experts.len() => drop(experts.remove(*e)),
        Change::Remove(e) => return Err(EditError::NoExpert(*e)),
    }
    write(&recipe)
}

/// The recipe's text with a word in place of what it says of the texts of experts, but for one of them: they need not be there any more.
pub fn without_texts(text: &str, but: Option<usize>) -> Result<String, EditError> {
    let mut recipe = read(text)?;
    for (e, expert) in recipe.get_mut("experts").and_then(Value::as_array_mut).into_iter().flatten().enumerate() {
        if let Some(expert) = expert.as_object_mut().filter(|_| Some(e) != but) {
            TEXTS.iter().for_each(|key| drop(expert.shift_remove(*key)));
            expert.insert("positive_prompts".into(), json!([format!("what expert {e} is for")]));
        }
    }
    write(&recipe)
}

fn read(text: &str) -> Result<Map<String, Value>, EditError> {
    serde_saphyr::from_str_with_options(text, super::yaml::options()).map_err(|error| EditError::Yaml(error.to_string()))
}

fn write(recipe: &Map<String, Value>) -> Result<String, EditError> {
    serde_saphyr::to_string(recipe).map_err(|error| EditError::Yaml(error.to_string()))
}

/// The keys of an expert that say what it is for.
const TEXTS: [&str; 4] = ["positive_prompts", "negative_prompts", "prompts_file", "text_file"];

fn described(mut expert: Map<String, Value>, new: &NewExpert) -> Value {
    expert.insert("source_model".into(), json!(new.source_model));
    if !new.positive_prompts.is_empty() || new.prompts_file.is_some() || new.text_file.is_some() {
        TEXTS.iter().for_each(|key| drop(expert.shift_remove(*key)));
    }
    if !new.positive_prompts.is_empty() {
        expert.insert("positive_prompts".into(), json!(new.positive_prompts));
    }
    for (key, file) in [("prompts_file", &new.prompts_file), ("text_file", &new.text_file)] {
        if let Some(file) = file {
            expert.insert(key.into(), json!(file));
        }
    }
    Value::Object(expert)
}

#[cfg(test)]
mod tests {
    use super::{Change, NewExpert, edit, without_texts};
    use crate::recipe::parse;

    const RECIPE: &str = "base_model: base # the one\nexperts:\n  - source_model: a\n    positive_prompts: [\"x: y\", 'no']\n    residual_scale: 0.5\n  \
                          - {source_model: b, positive_prompts: ['- z']}\nseed: 7\n";

    fn experts(text: &str) -> Vec<(String, Vec<String>, Option<f64>)> {
        let (recipe, _) = parse(text, "recipe.yml".as_ref(), &[]).unwrap();
        assert_eq!(recipe.seed, Some(7));
        let one =
            |expert: &crate::recipe::Expert| (expert.source_model.to_string(), expert.positive_prompts.clone(), expert.residual_scale);
        recipe.experts.iter().map(one).collect()
    }

    fn new(model: &str, prompts: &[&str]) -> NewExpert {
        let positive_prompts = prompts.iter().map(|&prompt| prompt.to_owned()).collect();
        NewExpert { source_model: model.to_owned(), positive_prompts, prompts_file: None, text_file: None }
    }

    #[test]
    fn experts_come_and_go_and_the_rest_stays() {
        let a = ("a".to_owned(), vec!["x: y".to_owned(), "no".to_owned()], Some(0.5));
        let b = ("b".to_owned(), vec!["- z".to_owned()], None);
        assert_eq!(experts(RECIPE), [a.clone(), b.clone()]);
        let c = ("c".to_owned(), vec!["\"q\": [1, #2]".to_owned()], None);
        let added = edit(RECIPE, &Change::Add(new("c", &["\"q\": [1, #2]"]))).unwrap();
        assert_eq!(experts(&added), [a.clone(), b.clone(), c.clone()]);
        let replaced = edit(&added, &Change::Replace(0, new("d", &[]))).unwrap();
        assert_eq!(experts(&replaced), [("d".to_owned(), a.1, a.2), b.clone(), c.clone()]);
        assert_eq!(experts(&edit(&added, &Change::Remove(0)).unwrap()), [b, c.clone()]);
        assert!(edit(RECIPE, &Change::Remove(2)).is_err() && edit(RECIPE, &Change::Replace(2, new("x", &[]))).is_err());
        assert_eq!(
            experts(&without_texts(&added, Some(2)).unwrap()),
            [("a".into(), vec!["what expert 0 is for".into()], Some(0.5)), ("b".into(), vec!["what expert 1 is for".into()], None), c]
        );
        assert!(edit("[1, 2]", &Change::Remove(0)).is_err() && edit("a: 1", &Change::Remove(0)).is_err());
    }
}
