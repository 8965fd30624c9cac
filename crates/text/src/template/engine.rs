//! The Jinja engine, set up as Hugging Face's chat renderer sets up Python's.

use std::error::Error as _;
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Serde};
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior, syntax::SyntaxConfig};
use serde_json::{Map, Value};

use super::{date, pyjson};
use crate::Error;

/// Instructions that one rendering may take: far more than any real conversation needs, and the bound on a template
/// that loops.
const FUEL: u64 = 30_000_000;

const NAME: &str = "chat_template";

/// A compiled template and its constants.
#[derive(Clone, Debug)]
pub(super) struct Engine {
    env: Environment<'static>,
    source: String,
    bos_token: String,
    eos_token: String,
}

/// What `raise_exception` was told; travels as the source of an engine error.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

impl Engine {
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Engine, Error> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.expect("default delimiters"));
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.set_fuel(Some(FUEL));
        env.add_filter("tojson", tojson);
        env.add_function("raise_exception", |message: String| -> Result<minijinja::Value, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.clone())
                .with_source(Raised(message)))
        });
        env.add_function("strftime_now", |format: &str| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            date::strftime(format, since.as_secs() as i64)
        });
        env.add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| Error::TemplateSyntax { line: error.line(), message: describe(&error) })?;
        Ok(Engine {
            env,
            source: source.to_owned(),
            bos_token: bos_token.to_owned(),
            eos_token: eos_token.to_owned(),
        })
    }

    pub fn source(&self) -> &str {
        &self.source
    }

    pub fn render(
        &self,
        messages: Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
        kwargs: &Map<String, Value>,
    ) -> Result<String, Error> {
        let mut variables = kwargs.clone();
        variables.insert("messages".to_owned(), messages);
        variables.insert("tools".to_owned(), tools.cloned().unwrap_or(Value::Null));
        variables.insert("add_generation_prompt".to_owned(), add_generation_prompt.into());
        variables.insert("bos_token".to_owned(), self.bos_token.as_str().into());
        variables.insert("eos_token".to_owned(), self.eos_token.as_str().into());
        let template = self.env.get_template(NAME).expect("added when the engine was made");
        template.render(Serde(&variables)).map_err(|error| {
            let line = error.line();
            match raised(&error) {
                Some(message) => Error::TemplateRaised { line, message },
                None => Error::TemplateFailed { line, message: describe(&error) },
            }
        })
    }
}

/// The template's own words, where `raise_exception` is behind the error.
fn raised(error: &minijinja::Error) -> Option<String> {
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return Some(message.clone());
        }
        source = cause.source();
    }
    None
}

/// Kind and detail, without the place, which the message has already.
fn describe(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// `json.dumps` with Hugging Face's defaults.
fn tojson(
    value: minijinja::Value,
    indent: Option<usize>,
    kwargs: Kwargs,
) -> Result<String, minijinja::Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => kwargs.get::<Option<usize>>("indent")?,
    };
    let mut style = pyjson::Style::indented(indent);
    style.sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    style.ensure_ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    if let Some(separators) = kwargs.get::<Option<Vec<String>>>("separators")? {
        let [entries, keys] = <[String; 2]>::try_from(separators).map_err(|_| {
            minijinja::Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two strings")
        })?;
        style.separators = (entries, keys);
    }
    kwargs.assert_all_used()?;
    let json = serde_json::to_value(&value)
        .map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, format!("tojson: {error}")))?;
    Ok(pyjson::dumps(&json, &style))
}

/// Hugging Face marks the assistant's text by `{% generation %}…{% endgeneration %}`, for training. Here the tags mean
/// nothing, so they become an `if` that is always true, which keeps their white space control.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        let (tag, after) = tag.split_at(end);
        let name = tag.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+']).trim();
        match name {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String, Error> {
        let kwargs = serde_json::json!({ "x": { "b": "<é>", "a": [1, 2.0, true, null] }, "s": " ab,c " });
        let messages = serde_json::json!([{ "role": "user", "content": "hi" }, { "role": "assistant", "content": "yo" }]);
        Engine::new(source, "<s>", "</s>")?.render(messages, None, true, kwargs.as_object().unwrap())
    }

    fn check(source: &str, expected: &str) {
        assert_eq!(render(source).unwrap_or_else(|error| panic!("{source}: {error}")), expected, "{source}");
    }

    #[test]
    fn what_python_templates_rely_on() {
        check("{{ bos_token }}{{ eos_token }}", "<s></s>");
        check("{{ x | tojson }}", r#"{"b": "<é>", "a": [1, 2.0, true, null]}"#);
        check("{{ x.a | tojson(indent=1) }}", "[\n 1,\n 2.0,\n true,\n null\n]");
        check(
            "{{ x | tojson(separators=(',', ':'), sort_keys=true) }}",
            r#"{"a":[1,2.0,true,null],"b":"<é>"}"#,
        );
        check("{{ none }}|{{ true }}|{{ missing }}", "None|True|");
        check("{{ s.strip().split(',')[-1] }}{{ s.startswith(' a') }}{{ s | trim | upper }}", "cTrueAB,C");
        check("{% for m in messages[::-1] %}{{ loop.index0 }}{{ m.role[:2] }}{% endfor %}", "0as1us");
        check(
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "2",
        );
        check(
            "{{ x is mapping }}{{ x.a is sequence }}{{ s is string }}{{ tools is none }}{{ y is defined }}",
            "TrueTrueTrueTrueFalse",
        );
        check("{% macro f(a, b='!') %}{{ a }}{{ b }}{% endmacro %}{{ f('x') }}", "x!");
        check(
            "{% for k, v in x.items() %}{{ k }}{% endfor %}{% for k, v in x | dictsort %}{{ k }}{% endfor %}",
            "baab",
        );
        check(
            "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
            "hi",
        );
        check("{{ messages | map(attribute='role') | join(',') }}", "user,assistant");
        check("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1");
        check("{{ 'content' in messages[0] }}{{ messages[0].get('nope') }}", "TrueNone");
        check("{{ '%s' | format('a') }}{{ 'a' ~ 1 }}{{ ('a' if false else 'b') }}", "aa1b");
        check("{{ strftime_now('%%') }}", "%");
    }

    #[test]
    fn blocks_eat_their_lines() {
        check("a\n  {% if true %}\nb\n  {% endif %}\nc\n", "a\nb\nc");
    }

    #[test]
    fn generation_tags_are_ignored() {
        check("a {%- generation -%} b {% endgeneration %} c", "ab  c");
    }

    #[test]
    fn failures_say_where() {
        let message = |source: &str| render(source).unwrap_err().to_string();
        assert_eq!(
            message("\n{{ raise_exception('roles must alternate') }}"),
            "chat template refused the messages at line 2: roles must alternate"
        );
        assert!(
            message("a\n{% if %}").starts_with("chat template does not parse at line 2: syntax error"),
            "{}",
            message("a\n{% if %}")
        );
        assert!(
            message("\n\n{{ nope.field }}").starts_with("chat template failed at line 3: undefined"),
            "{}",
            message("\n\n{{ nope.field }}")
        );
        // Raised inside a macro, still the template's own words.
        assert!(
            message("{% macro f() %}{{ raise_exception('no') }}{% endmacro %}{{ f() }}")
                .ends_with("refused the messages at line 1: no")
        );
    }

    #[test]
    fn endless_templates_end() {
        let source = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
        assert!(matches!(render(source), Err(Error::TemplateFailed { .. })));
    }
}
