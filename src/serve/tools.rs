//! Tools in a request: what the model is told of them, and what an answer must be so that it is a call.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::{
    calls::{Calls, Format},
    error::ApiError,
};
use crate::engine::{ChatTemplate, Grammar, Text};

/// Tools of one request at most.
const MOST: usize = 128;

/// The tools that a request offers, and what it wants of them.
#[derive(Debug, PartialEq)]
pub(super) struct Tools {
    /// each `{"type": "function", "function": {"name", "description", "parameters"}}`
    all: Vec<Value>,
    choice: Choice,
    parallel: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Choice {
    Auto,
    Required,
    Named(String),
}

impl Tools {
    /// `tools`, `tool_choice` and `parallel_tool_calls`, or the older `functions` and `function_call`; `None` where there is nothing to call.
    pub(super) fn parse(
        [tools, choice, functions, function_call]: [Option<&Value>; 4],
        parallel: Option<bool>,
    ) -> Result<Option<Self>, ApiError> {
        let given = |value: Option<&Value>| value.filter(|value| !value.is_null()).cloned();
        let (field, tools, choice_field, choice) = match (given(tools), given(functions)) {
            (Some(tools), _) => ("tools", tools, "tool_choice", given(choice)),
            (None, Some(functions)) => ("functions", functions, "function_call", given(function_call)),
            (None, None) if given(choice).is_some_and(|choice| choice != "none" && choice != "auto") => {
                return Err(ApiError::invalid("tool_choice", "`tool_choice` asks for a call, but there are no `tools`"));
            }
            (None, None) => return Ok(None),
        };
        let list = tools.as_array().ok_or_else(|| ApiError::invalid(field, format!("`{field}` must be a list")))?;
        if list.len() > MOST {
            return Err(ApiError::invalid(field, format!("`{field}` has {} entries, expected {MOST} at most", list.len())));
        }
        let all = list.iter().enumerate().map(|(i, tool)| self::tool(field, i, tool)).collect::<Result<Vec<_>, _>>()?;
        let choice = match choice.as_ref() {
            None => Choice::Auto,
            Some(Value::String(word)) => match word.as_str() {
                "auto" => Choice::Auto,
                "none" => return Ok(None),
                "required" | "any" => Choice::Required,
                _ => return Err(unknown_choice(choice_field)),
            },
            Some(object) => {
                let name = object["function"]["name"].as_str().or(object["name"].as_str()).ok_or_else(|| unknown_choice(choice_field))?;
                if !all.iter().any(|tool| tool["function"]["name"] == name) {
                    return Err(ApiError::invalid(choice_field, format!("`{choice_field}` names `{name}`, which is not among the tools")));
                }
                Choice::Named(name.to_owned())
            }
        };
        if all.is_empty() {
            return if choice == Choice::Auto { Ok(None) } else { Err(ApiError::invalid(choice_field, "there are no tools to call")) };
        }
        Ok(Some(Self { all, choice, parallel: parallel.unwrap_or(true) }))
    }

    /// Whether the answer must be a call.
    pub(super) fn must_call(&self) -> bool {
        self.choice != Choice::Auto
    }

    fn names(&self) -> BTreeSet<String> {
        self.all.iter().filter_map(|tool| tool["function"]["name"].as_str().map(str::to_owned)).collect()
    }

    /// Reads calls out of an answer.
    pub(super) fn calls(&self, template: Option<&ChatTemplate>) -> Calls {
        Calls::new(format(template), self.names())
    }

    /// What only calls of the wanted tools fit, where the answer must be one.
    pub(super) fn grammar(&self, text: &Text) -> Option<Grammar> {
        let wanted = |tool: &&Value| match &self.choice {
            Choice::Named(name) => tool["function"]["name"] == name.as_str(),
            Choice::Required | Choice::Auto => true,
        };
        if !self.must_call() {
            return None;
        }
        let format = format(text.template.as_ref());
        let arguments = if format == Format::Llama { "parameters" } else { "arguments" };
        let call = |tool: &Value| {
            let function = &tool["function"];
            let parameters = function.get("parameters").filter(|schema| !schema.is_null()).cloned();
            json!({
                "type": "object",
                "properties": {"name": {"const": function["name"]}, arguments: parameters.unwrap_or_else(|| json!({"type": "object", "properties": {}, "additionalProperties": false}))},
                "required": ["name", arguments], "additionalProperties": false,
            })
        };
        let calls: Vec<Value> = self.all.iter().filter(wanted).map(call).collect();
        let compact = json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
        let call = json!({"x-guidance": compact, "anyOf": calls});
        Some(Grammar::Lark(match format {
            Format::Hermes => {
                let more = if self.parallel { " (\"\\n\" call)*" } else { "" };
                format!("start: call{more}\ncall: \"<tool_call>\\n\" object \"\\n</tool_call>\"\nobject: %json {call}\n")
            }
            Format::Mistral => {
                let mut list = json!({"x-guidance": compact, "type": "array", "items": {"anyOf": calls}, "minItems": 1});
                if !self.parallel {
                    list["maxItems"] = 1.into();
                }
                let opening = Format::Mistral.opening();
                let mark = text.tokenizer.special(opening).map_or_else(|| format!("\"{opening}\""), |id| format!("<[{id}]>"));
                format!("start: {mark} \" \"? calls\ncalls: %json {list}\n")
            }
            Format::Llama => format!("start: call\ncall: %json {call}\n"),
        }))
    }
}

/// A tool as templates expect it.
fn tool(field: &str, i: usize, tool: &Value) -> Result<Value, ApiError> {
    let invalid = |what: &str, expected: &str| {
        let param = format!("{field}[{i}]{what}");
        let message = format!("`{param}` must be {expected}");
        ApiError::invalid(param, message)
    };
    if tool.get("type").is_some_and(|kind| kind != "function") {
        return Err(invalid(".type", "\"function\": tools of other types are not called here"));
    }
    let function = if field == "functions" { tool } else { &tool["function"] };
    let function = function.as_object().ok_or_else(|| invalid(".function", "an object with `name`, `description` and `parameters`"))?;
    let good =
        |name: &str| (1..=64).contains(&name.len()) && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'));
    if !function.get("name").and_then(Value::as_str).is_some_and(good) {
        return Err(invalid(".function.name", "a name of 1 to 64 letters, digits, `_`, `-` or `.`"));
    }
    if function.get("parameters").is_some_and(|schema| !schema.is_object() && !schema.is_null()) {
        return Err(invalid(".function.parameters", "a JSON schema, an object"));
    }
    Ok(json!({"type": "function", "function": function}))
}

fn unknown_choice(field: &str) -> ApiError {
    ApiError::invalid(field, format!("`{field}` must be \"auto\", \"none\", \"required\" or a function by its name"))
}

/// How the model was taught to call: its template shows it.
fn format(template: Option<&ChatTemplate>) -> Format {
    let source = template.map_or("", ChatTemplate::source);
    if source.contains("[TOOL_CALLS]") {
        Format::Mistral
    } else if source.contains("tools")
        && !source.contains("<tool_call>")
        && (source.contains("python_tag") || source.contains("\"parameters\""))
    {
        Format::Llama
    } else {
        Format::Hermes
    }
}

/// Whether the template tells the model of tools by itself.
fn native(template: Option<&ChatTemplate>) -> bool {
    template.is_some_and(|template| template.source().contains("tools"))
}

/// Tells the model of tools, and of calls that were made: by the template where it can, else by words in messages.
pub(super) fn explain(
    tools: Option<&Tools>,
    messages: &mut Vec<Value>,
    variables: &mut Map<String, Value>,
    template: Option<&ChatTemplate>,
) {
    messages.iter_mut().for_each(arguments_as_objects);
    if native(template) {
        if let Some(tools) = tools {
            variables.entry("tools").or_insert_with(|| tools.all.clone().into());
        }
        return;
    }
    messages.iter_mut().for_each(in_words);
    let Some(tools) = tools else { return };
    let signatures: Vec<String> = tools.all.iter().map(Value::to_string).collect();
    let told = format!(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within \
         <tools></tools> XML tags:\n<tools>\n{}\n</tools>\n\nFor each function call, return a json object with function name and arguments within \
         <tool_call></tool_call> XML tags:\n<tool_call>\n{{\"name\": <function-name>, \"arguments\": <args-json-object>}}\n</tool_call>",
        signatures.join("\n")
    );
    match messages.first_mut().filter(|first| first["role"] == "system") {
        Some(system) => system["content"] = format!("{}\n\n{told}", system["content"].as_str().unwrap_or_default()).into(),
        None => messages.insert(0, json!({"role": "system", "content": told})),
    }
}

/// Templates write arguments as JSON themselves; clients send them as a string of it.
fn arguments_as_objects(message: &mut Value) {
    for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        let parsed = call["function"]["arguments"].as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
        if let Some(arguments) = parsed.filter(Value::is_object) {
            call["function"]["arguments"] = arguments;
        }
    }
}

/// Calls and their results as text, for templates that know nothing else.
fn in_words(message: &mut Value) {
    let content = message["content"].as_str().unwrap_or_default().to_owned();
    if message["role"] == "tool" {
        *message = json!({"role": "user", "content": format!("<tool_response>\n{content}\n</tool_response>")});
    } else if let Some(calls) = message.get("tool_calls").and_then(Value::as_array) {
        let call = |call: &Value| {
            let (name, arguments) = (&call["function"]["name"], &call["function"]["arguments"]);
            format!("<tool_call>\n{}\n</tool_call>", json!({"name": name, "arguments": arguments}))
        };
        let words = std::iter::once(content).filter(|content| !content.is_empty()).chain(calls.iter().map(call));
        *message = json!({"role": message["role"], "content": words.collect::<Vec<_>>().join("\n")});
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn parse(body: &Value) -> Result<Option<Tools>, ApiError> {
        let parallel = body["parallel_tool_calls"].as_bool();
        Tools::parse(["tools", "tool_choice", "functions", "function_call"].map(|field| body.get(field)), parallel)
    }

    fn tools(choice: &Value) -> Tools {
        parse(&json!({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": choice})).unwrap().unwrap()
    }

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, BTreeMap::new()).unwrap()
    }

    #[test]
    fn nothing_to_call_is_nothing() {
        let tool = json!({"type": "function", "function": {"name": "f"}});
        for body in [
            json!({}),
            json!({"tools": null, "tool_choice": "auto"}),
            json!({"tools": []}),
            json!({"tools": [tool], "tool_choice": "none"}),
            json!({"functions": []}),
        ] {
            assert_eq!(parse(&body).unwrap(), None, "{body}");
        }
    }

    #[test]
    fn choices_are_understood_in_both_spellings() {
        assert!(!tools(&json!("auto")).must_call());
        assert!(tools(&json!("required")).must_call());
        assert_eq!(tools(&json!({"type": "function", "function": {"name": "f"}})).choice, Choice::Named("f".into()));
        let old = parse(&json!({"functions": [{"name": "f"}], "function_call": {"name": "f"}})).unwrap().unwrap();
        assert_eq!(old, tools(&json!({"type": "function", "function": {"name": "f"}})));
    }

    #[test]
    fn mistakes_name_their_field() {
        let tool = json!({"type": "function", "function": {"name": "f"}});
        for (body, param) in [
            (json!({"tools": {}}), "tools"),
            (json!({"tools": [{"type": "code_interpreter"}]}), "tools[0].type"),
            (json!({"tools": [tool, {"type": "function"}]}), "tools[1].function"),
            (json!({"tools": [{"function": {"name": "two words"}}]}), "tools[0].function.name"),
            (json!({"tools": [{"function": {"name": "f", "parameters": []}}]}), "tools[0].function.parameters"),
            (json!({"tools": [tool], "tool_choice": "sometimes"}), "tool_choice"),
            (json!({"tools": [tool], "tool_choice": {"function": {"name": "g"}}}), "tool_choice"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": [], "tool_choice": "required"}), "tool_choice"),
        ] {
            assert_eq!(parse(&body).unwrap_err().param.as_deref(), Some(param), "{body}");
        }
    }

    #[test]
    fn templates_show_how_calls_are_written() {
        for (source, expected) in [
            ("{% if tools %}<tool_call>{% endif %}", Format::Hermes),
            ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", Format::Mistral),
            ("{% if tools %}{\"name\": ..., \"parameters\": ...}<|python_tag|>{% endif %}", Format::Llama),
            ("{{ messages[0].content }}", Format::Hermes),
        ] {
            assert_eq!(format(Some(&template(source))), expected, "{source}");
        }
    }

    #[test]
    fn templates_without_tools_are_told_in_words() {
        let plain = template("{{ messages }}");
        let calls = json!([{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]);
        let talk = json!([
            {"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": "42"},
        ]);
        let (mut messages, mut variables) = (talk.as_array().unwrap().clone(), Map::new());
        explain(Some(&tools(&json!("auto"))), &mut messages, &mut variables, Some(&plain));
        assert!(variables.is_empty());
        assert_eq!(messages[0]["role"], "system");
        assert!(messages[0]["content"].as_str().unwrap().contains("\"name\":\"f\""), "{}", messages[0]);
        let said = json!({"role": "assistant", "content": "<tool_call>\n{\"name\":\"f\",\"arguments\":{\"x\":1}}\n</tool_call>"});
        assert_eq!(messages[2..], [said, json!({"role": "user", "content": "<tool_response>\n42\n</tool_response>"})]);

        let knows = template("{{ tools }}{{ messages }}");
        let mut messages = talk.as_array().unwrap().clone();
        explain(Some(&tools(&json!("auto"))), &mut messages, &mut variables, Some(&knows));
        assert_eq!(variables["tools"][0]["function"]["name"], "f");
        assert_eq!(messages[1]["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
        assert_eq!(messages[2]["role"], "tool");
    }
}
