//! Chat templates: messages to the prompt that the model was trained on.
//!
//! A template is Jinja as `transformers` runs it (`trim_blocks`, `lstrip_blocks`, Python methods, `json.dumps` spacing). Where the text comes
//! from is decided here too; tokenizing the result is not.

mod tags;

use std::{collections::BTreeMap, fmt::Write as _, io, time::SystemTime};

use minijinja::{
    Environment, ErrorKind, Output, State, UndefinedBehavior, Value, escape_formatter,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde, ValueKind},
};
use serde::Serialize as _;
use serde_json::{Map, Value as Json};

use super::sidecars::{SidecarError, json, text};
use crate::source::Sidecar;

/// Instructions that one rendering may take: a template that loops for ever is an error, not a hang.
const FUEL: u64 = 2_000_000;

/// Bytes that one rendering may write, what it sets aside in blocks and macros included.
const MOST: usize = 16 << 20;

/// Values that one rendering may look at when it assigns, those in others included, and how deep they may lie in each other.
const MOST_WEIGHED: usize = 10_000_000;
const DEEPEST: usize = 64;

/// Columns that JSON may be indented by.
const INDENT: usize = 64;

const NAME: &str = "chat template";

/// A model's chat template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    tokens: BTreeMap<String, String>,
}

/// What a template is rendered with.
#[derive(Debug, Clone, Copy)]
pub struct Chat<'a> {
    /// Objects with `role` and `content` and whatever else the template knows.
    pub messages: &'a [Json],
    /// Whether the prompt ends where the assistant begins to speak.
    pub add_generation_prompt: bool,
    /// Further variables (`enable_thinking`, `tools` ...); they win over ours.
    pub variables: &'a Map<String, Json>,
    /// What `strftime_now` formats (in UTC). Without it the function is not defined, and the prompt depends on nothing but its input.
    pub now: Option<SystemTime>,
}

/// Why there is no prompt.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template's text could not be had.
    #[error(transparent)]
    Sidecar(#[from] SidecarError),
    /// `chat_template` is neither text nor a list with a default.
    #[error("{file}: `chat_template` must be a string or a list of `name` and `template` with one named `default`")]
    Shape {
        /// where it stands
        file: &'static str,
    },
    /// It is not Jinja.
    #[error("the chat template does not compile: {0}")]
    Syntax(#[source] minijinja::Error),
    /// The template called `raise_exception`.
    #[error("the model's chat template refuses these messages: {0}")]
    Raised(String),
    /// Its output has no end in sight.
    #[error("the chat template writes more than {} MB", MOST >> 20)]
    Long,
    /// It failed while it ran.
    #[error("the chat template failed: {0}")]
    Render(#[source] minijinja::Error),
}

impl ChatTemplate {
    /// The template among a model's sidecars (`chat_template.jinja`, then `chat_template.json`, then `tokenizer_config.json`), if there is one.
    /// `tokens` are the special tokens by their names in `tokenizer_config.json`: `bos_token`, `eos_token` ...
    pub fn open(sidecars: &BTreeMap<String, Sidecar>, tokens: BTreeMap<String, String>) -> Result<Option<Self>, TemplateError> {
        Self::text(sidecars)?.map(|source| Self::new(&source, tokens)).transpose()
    }

    /// The text of that template.
    pub fn text(sidecars: &BTreeMap<String, Sidecar>) -> Result<Option<String>, TemplateError> {
        Ok(match text(sidecars, "chat_template.jinja")? {
            Some(text) => Some(text),
            None => match from_json(sidecars, "chat_template.json")? {
                Some(text) => Some(text),
                None => from_json(sidecars, "tokenizer_config.json")?,
            },
        })
    }

    /// Compiles a template.
    pub fn new(source: &str, tokens: BTreeMap<String, String>) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(TemplateError::Syntax)?;
        environment.set_syntax(syntax);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.set_formatter(write_value);
        environment.add_filter("tojson", tojson);
        environment.add_filter(tags::ASSIGNED[0], assigned);
        environment.add_filter(tags::ASSIGNED[1], held);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
        });
        environment.add_template_owned(NAME, tags::prepared(source)).map_err(TemplateError::Syntax)?;
        Ok(Self { environment, source: source.to_owned(), tokens })
    }

    /// Its text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt, special tokens written out.
    pub fn render(&self, chat: &Chat<'_>) -> Result<String, TemplateError> {
        let mut context: BTreeMap<&str, Value> = self.tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token))).collect();
        context.insert("messages", Value::from(Serde(chat.messages)));
        context.insert("add_generation_prompt", Value::from(chat.add_generation_prompt));
        if let Some(now) = chat.now {
            context.insert("strftime_now", Value::from_function(move |format: String| strftime(&format, now)));
        }
        context.extend(chat.variables.iter().map(|(name, value)| (name.as_str(), Value::from(Serde(value)))));
        let template = self.environment.get_template(NAME).map_err(TemplateError::Render)?;
        let mut prompt = Prompt(Vec::new());
        template.render_captured_to(context, &mut prompt).map_err(|error| match (cause(&error), cause::<io::Error>(&error)) {
            (Some(Raised(message)), _) => TemplateError::Raised(message.clone()),
            (None, Some(_)) => TemplateError::Long,
            (None, None) => TemplateError::Render(error),
        })?;
        // Whole strings were written.
        Ok(String::from_utf8_lossy(&prompt.0).into_owned())
    }
}

/// What was written, as long as it is no more than it may be.
struct Prompt(Vec<u8>);

impl io::Write for Prompt {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MOST {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a value if there is room for it, wherever it goes: what a block or a macro returns is not in the prompt yet.
fn write_value(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), minijinja::Error> {
    let room = state.get_or_insert_extension(Room(MOST));
    write!(room, "{value}").map_err(|_| {
        minijinja::Error::new(ErrorKind::WriteFailure, "too much is written").with_source(io::Error::from(io::ErrorKind::FileTooLarge))
    })?;
    escape_formatter(out, state, value)
}

/// Counts what is written.
struct Room(usize);

impl std::fmt::Write for Room {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0 = self.0.checked_sub(text.len()).ok_or(std::fmt::Error)?;
        Ok(())
    }
}

/// A template's own refusal, told apart from a mistake in the template.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// The error of that type that another one came of.
fn cause<E: std::error::Error + 'static>(error: &minijinja::Error) -> Option<&E> {
    std::iter::successors(std::error::Error::source(error), |error| error.source()).find_map(|error| error.downcast_ref())
}

fn from_json(sidecars: &BTreeMap<String, Sidecar>, file: &'static str) -> Result<Option<String>, TemplateError> {
    let Some(config) = json(sidecars, file)? else { return Ok(None) };
    let shape = || TemplateError::Shape { file };
    match config.get("chat_template") {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(template)) => Ok(Some(template.clone())),
        Some(Json::Array(named)) => {
            let default = named.iter().find(|t| t["name"] == "default").or(if let [only] = named.as_slice() { Some(only) } else { None });
            default.and_then(|t| t["template"].as_str()).map(|t| Some(t.to_owned())).ok_or_else(shape)
        }
        Some(_) => Err(shape()),
    }
}

/// Passes on what is assigned to a name, if it is no larger than may be written.
fn assigned(state: &mut State<'_, '_>, value: Value) -> Result<Value, minijinja::Error> {
    weigh(state.get_or_insert_extension(Weighed(0)), &value, 0)?;
    Ok(value)
}

/// The same of what is assigned to an attribute. What holds itself could not be written: no namespace is held by another.
fn held(state: &mut State<'_, '_>, value: Value) -> Result<Value, minijinja::Error> {
    weigh(state.get_or_insert_extension(Weighed(0)), &value, 1)?;
    Ok(value)
}

/// Values that were looked at in one rendering.
struct Weighed(usize);

/// Looks at a value and all that is in it, `depth` levels down in another.
fn weigh(weighed: &mut Weighed, value: &Value, depth: usize) -> Result<(), minijinja::Error> {
    let refuse = |what: &'static str| Err(minijinja::Error::new(ErrorKind::InvalidOperation, what));
    weighed.0 += 1;
    if weighed.0 > MOST_WEIGHED || value.as_str().is_some_and(|text| text.len() > MOST) {
        return refuse("a value that is assigned is too large");
    }
    let Some(object) = value.as_object() else { return Ok(()) };
    if object.type_name().ends_with("::Namespace") {
        return if depth == 0 { Ok(()) } else { refuse("a namespace cannot be held by another value") };
    }
    if depth > DEEPEST {
        return refuse("a value that is assigned is nested too deeply");
    }
    match value.kind() {
        ValueKind::Map => value.try_iter()?.try_for_each(|key| weigh(weighed, &value.get_item(&key)?, depth + 1)),
        ValueKind::Seq | ValueKind::Iterable => value.try_iter()?.try_for_each(|item| weigh(weighed, &item, depth + 1)),
        _ => Ok(()),
    }
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=...)`.
#[expect(clippy::needless_pass_by_value, reason = "minijinja hands filters their arguments by value")]
fn tojson(value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent = options.get::<Option<usize>>("indent")?.map(|width| width.min(INDENT));
    let _same_text: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    let result = match indent {
        Some(width) => {
            let indent = " ".repeat(width);
            value.serialize(&mut serde_json::Serializer::with_formatter(
                &mut out,
                serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes()),
            ))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonFormatter)),
    };
    let fail = |reason: String| minijinja::Error::new(ErrorKind::BadSerialization, reason);
    result.map_err(|error| fail(error.to_string()))?;
    String::from_utf8(out).map_err(|error| fail(error.to_string()))
}

/// One line with a space after each comma and colon.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.begin_array_value(writer, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

fn strftime(format: &str, now: SystemTime) -> Result<String, minijinja::Error> {
    let fail = |error: jiff::Error| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"));
    let now = jiff::Timestamp::try_from(now).map_err(fail)?.to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(format, &now).map_err(fail)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    fn render_with(source: &str, messages: &Json, variables: &Json) -> Result<String, TemplateError> {
        let tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned()), ("eos_token".to_owned(), "</s>".to_owned())]);
        ChatTemplate::new(source, tokens)?.render(&Chat {
            messages: messages.as_array().unwrap(),
            add_generation_prompt: true,
            variables: variables.as_object().unwrap(),
            now: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(86_400 * 200)),
        })
    }

    fn render(source: &str, messages: &Json) -> Result<String, TemplateError> {
        render_with(source, messages, &json!({}))
    }

    #[test]
    fn llama_3_puts_bos_and_headers() {
        let template = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";
        let messages = json!([{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}]);
        assert_eq!(
            render(template, &messages).unwrap(),
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        );
    }

    #[test]
    fn mistral_raises_its_own_exception() {
        let template = "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}";
        let turns =
            json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c & <d>"}]);
        assert_eq!(render(template, &turns).unwrap(), "<s>[INST] a [/INST]b</s>[INST] c & <d> [/INST]");
        let error = render(template, &json!([{"role": "assistant", "content": "b"}])).unwrap_err();
        assert!(matches!(&error, TemplateError::Raised(message) if message.starts_with("Conversation roles must alternate")), "{error}");
    }

    #[test]
    fn qwen_3_uses_python_methods_slices_namespaces_and_tools() {
        let template = r##"{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"##;
        let messages = json!([
            {"role": "system", "content": "S"}, {"role": "user", "content": "1"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"}, {"role": "user", "content": "3"},
        ]);
        assert_eq!(
            render_with(template, &messages, &json!({"enable_thinking": false})).unwrap(),
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n3<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        );
        let tools = json!({"tools": [{"type": "function", "a": [1, "it's <b>"], "Z": {}}]});
        let with_tools = render_with(template, &json!([{"role": "user", "content": "u"}]), &tools).unwrap();
        assert_eq!(
            with_tools,
            "<|im_start|>system\n# Tools\n<tools>\n{\"type\": \"function\", \"a\": [1, \"it's <b>\"], \"Z\": {}}\n</tools><|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn tojson_indents_like_python() {
        let out = render("{{ messages | tojson(indent=2) }}", &json!([{"é": [1.0, null, true], "e": []}])).unwrap();
        assert_eq!(out, "[\n  {\n    \"é\": [\n      1.0,\n      null,\n      true\n    ],\n    \"e\": []\n  }\n]");
    }

    #[test]
    fn generation_tags_vanish_with_their_white_space() {
        let template = "{% for m in messages %}\n  {%- generation %}\n{{ m.content }}\n  {% endgeneration %}\n{% endfor %}{%- generation -%} x{%endgeneration%}";
        assert_eq!(render(template, &json!([{"content": "a"}, {"content": "b"}])).unwrap(), "a\nb\nx");
    }

    #[test]
    fn strftime_now_formats_the_given_time_and_is_undefined_without_one() {
        assert_eq!(render("{{ strftime_now('%d %b %Y') }}", &json!([])).unwrap(), "20 Jul 1970");
        let template = ChatTemplate::new("{{ 'now' if strftime_now is defined else 'never' }}", BTreeMap::new()).unwrap();
        let chat = Chat { messages: &[], add_generation_prompt: false, variables: &Map::new(), now: None };
        assert_eq!(template.render(&chat).unwrap(), "never");
    }

    #[test]
    fn endless_and_broken_templates_are_errors() {
        let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        assert!(matches!(render(endless, &json!([])).unwrap_err(), TemplateError::Render(_)));
        assert!(matches!(render("{% for %}", &json!([])).unwrap_err(), TemplateError::Syntax(_)));
        assert!(matches!(render("{{ messages[0].a.b }}", &json!([{"role": 1}])).unwrap_err(), TemplateError::Render(_)));
    }

    #[test]
    fn what_is_written_has_an_end() {
        let doubling = "{% set ns = namespace(s='0123456789abcdef') %}{% for i in range(40) %}{% set ns.s = f(ns.s) %}{% endfor %}";
        for source in [
            format!("{{% macro f(x) %}}{{{{ x }}}}{{{{ x }}}}{{% endmacro %}}{doubling}"),
            "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}".into(),
            format!("{{% for a in range(99999) %}}{}{{% endfor %}}", "x".repeat(1000)),
            "{{ ['x' * 1000] * 99999 }}".into(),
        ] {
            let error = render(&source, &json!([])).unwrap_err();
            assert!(matches!(error, TemplateError::Long), "{source}: {error}");
        }
        assert_eq!(render("{{ 'x' * 9999999 }}", &json!([])).unwrap().len(), 9_999_999);
        assert_eq!(render("{{ [1] | tojson(indent=999999999999) }}", &json!([])).unwrap(), format!("[\n{}1\n]", " ".repeat(INDENT)));
    }

    #[test]
    fn values_neither_hold_themselves_nor_grow_without_end() {
        for (source, reason) in [
            ("{% set ns = namespace() %}{% set ns.s = ns %}{{ ns }}", "a namespace cannot be held"),
            ("{% set ns = namespace() %}{% set x = {'a': [ns]} %}{{ x }}", "a namespace cannot be held"),
            ("{% set ns = namespace(s=[]) %}{% for i in range(9999) %}{% set ns.s = [ns.s] %}{% endfor %}", "nested too deeply"),
            ("{% set ns = namespace(s='0123456789') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "too large"),
            ("{% set x = [[1] * 99999] * 99999 %}", "too large"),
        ] {
            let error = render(source, &json!([])).unwrap_err().to_string();
            assert!(error.contains(reason), "{source}: {error}");
        }
        let source = "{% set ns = namespace(a=[], b={'c': 1}) %}{% for m in messages %}{% set ns.a = ns.a + [m.content] %}{% endfor %}{{ ns.a | join(',') }}{{ ns.b.c }}";
        assert_eq!(render(source, &json!([{"content": "x"}, {"content": "y"}])).unwrap(), "x,y1");
    }

    #[test]
    fn the_source_is_found_in_the_order_of_transformers() {
        let made = |text: String| Sidecar::Made(text.into_bytes());
        let open = |files: Vec<(&str, String)>| {
            let sidecars = files.into_iter().map(|(name, text)| (name.to_owned(), made(text))).collect();
            ChatTemplate::open(&sidecars, BTreeMap::new()).map(|template| {
                template
                    .map(|t| t.render(&Chat { messages: &[], add_generation_prompt: false, variables: &Map::new(), now: None }).unwrap())
            })
        };
        let named = json!({"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}).to_string();
        let plain = json!({"chat_template": "C"}).to_string();
        assert_eq!(open(vec![("tokenizer_config.json", named.clone())]).unwrap().as_deref(), Some("D"));
        assert_eq!(open(vec![("tokenizer_config.json", named), ("chat_template.json", plain.clone())]).unwrap().as_deref(), Some("C"));
        assert_eq!(open(vec![("chat_template.json", plain), ("chat_template.jinja", "J".into())]).unwrap().as_deref(), Some("J"));
        assert_eq!(open(vec![("tokenizer_config.json", "{}".into())]).unwrap(), None);
        assert!(matches!(
            open(vec![("tokenizer_config.json", r#"{"chat_template": 1}"#.into())]),
            Err(TemplateError::Shape { file: "tokenizer_config.json" })
        ));
        assert!(matches!(open(vec![("tokenizer_config.json", "{".into())]), Err(TemplateError::Sidecar(_))));
    }
}
