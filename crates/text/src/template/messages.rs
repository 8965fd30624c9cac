//! Brings the messages of a request into the form that a template takes.
//!
//! OpenAI's requests hold content as a string, a list of parts or null, and tool arguments as JSON text; templates
//! mostly expect a string, and arguments as an object.

use serde_json::{Map, Value, json};

use super::Capabilities;
use crate::Error;

/// The messages as the template takes them.
pub(super) fn prepare(messages: &Value, can: &Capabilities) -> Result<Value, Error> {
    let Some(messages) = messages.as_array() else {
        return Err(Error::BadMessages(format!("expected an array, found {}", kind(messages))));
    };
    let mut out: Vec<Value> = Vec::with_capacity(messages.len());
    for (i, message) in messages.iter().enumerate() {
        let bad = |text: String| Error::BadMessages(format!("message {i}: {text}"));
        let mut message = message
            .as_object()
            .ok_or_else(|| bad(format!("expected an object, found {}", kind(message))))?
            .clone();
        if !message.get("role").is_some_and(Value::is_string) {
            return Err(bad("expected a string `role`".to_owned()));
        }
        let content = content(message.get("content").unwrap_or(&Value::Null), can).map_err(bad)?;
        message.insert("content".to_owned(), content);
        if can.object_arguments {
            parse_arguments(&mut message);
        }
        out.push(Value::Object(message));
    }
    if !can.system_role {
        fold_system(&mut out);
    }
    Ok(Value::Array(out))
}

fn content(content: &Value, can: &Capabilities) -> Result<Value, String> {
    match content {
        Value::Null => Ok(json!("")),
        Value::String(text) if can.string_content => Ok(json!(text)),
        Value::String(text) => Ok(json!([{ "type": "text", "text": text }])),
        Value::Array(parts) => {
            let texts = parts.iter().map(text_of_part).collect::<Result<Vec<&str>, String>>()?;
            if can.content_parts { Ok(content.clone()) } else { Ok(json!(texts.join("\n"))) }
        }
        other => {
            Err(format!("expected `content` to be a string, a list of parts or null, found {}", kind(other)))
        }
    }
}

fn text_of_part(part: &Value) -> Result<&str, String> {
    match part.get("type").and_then(Value::as_str) {
        Some("text") => match part.get("text") {
            Some(Value::String(text)) => Ok(text),
            _ => Err("a content part of type `text` has no string `text`".to_owned()),
        },
        Some(other) => Err(format!("content parts of type `{other}` are not supported, only `text`")),
        None => Err("a content part has no string `type`".to_owned()),
    }
}

/// Replaces JSON text in `tool_calls[].function.arguments` by the object it describes.
fn parse_arguments(message: &mut Map<String, Value>) {
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
        // Text that is no object, as a model may have written it, stays text.
        if let Some(Ok(object @ Value::Object(_))) = arguments.as_str().map(serde_json::from_str) {
            *arguments = object;
        }
    }
}

/// Puts system messages in front of the user message that follows, for templates that know no system role.
fn fold_system(messages: &mut Vec<Value>) {
    let mut waiting: Vec<String> = Vec::new();
    messages.retain_mut(|message| match message["role"].as_str() {
        Some("system") => {
            waiting.push(text_of(&message["content"]));
            false
        }
        Some("user") if !waiting.is_empty() => {
            waiting.push(text_of(&message["content"]));
            let text = std::mem::take(&mut waiting).join("\n\n");
            message["content"] = match &message["content"] {
                Value::Array(_) => json!([{ "type": "text", "text": text }]),
                _ => json!(text),
            };
            true
        }
        _ => true,
    });
    if !waiting.is_empty() {
        messages.push(json!({ "role": "user", "content": waiting.join("\n\n") }));
    }
}

/// The text of content that [`content`] has checked.
fn text_of(content: &Value) -> String {
    match content {
        Value::Array(parts) => {
            parts.iter().filter_map(|part| text_of_part(part).ok()).collect::<Vec<_>>().join("\n")
        }
        other => other.as_str().unwrap_or_default().to_owned(),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a bool",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Capabilities = Capabilities {
        system_role: true,
        tools: true,
        tool_calls: true,
        object_arguments: true,
        enable_thinking: true,
        string_content: true,
        content_parts: true,
    };

    fn check(can: Capabilities, messages: Value, expected: Value) {
        assert_eq!(prepare(&messages, &can).unwrap(), expected);
    }

    #[test]
    fn content_takes_the_form_the_template_takes() {
        let parts = json!([{ "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] }]);
        check(ALL, parts.clone(), parts.clone());
        let no_parts = Capabilities { content_parts: false, ..ALL };
        check(no_parts, parts, json!([{ "role": "user", "content": "a\nb" }]));
        let only_parts = Capabilities { string_content: false, ..ALL };
        let text = json!([{ "role": "user", "content": "a" }]);
        check(only_parts, text, json!([{ "role": "user", "content": [{ "type": "text", "text": "a" }] }]));
        check(
            ALL,
            json!([{ "role": "assistant", "content": null }]),
            json!([{ "role": "assistant", "content": "" }]),
        );
        check(ALL, json!([{ "role": "assistant" }]), json!([{ "role": "assistant", "content": "" }]));
    }

    #[test]
    fn arguments_become_objects() {
        let call = |arguments: Value| json!([{ "role": "assistant", "content": "", "tool_calls": [{ "function": { "name": "f", "arguments": arguments } }] }]);
        check(ALL, call(json!("{\"b\":1,\"a\":2}")), call(json!({ "b": 1, "a": 2 })));
        check(ALL, call(json!("not json")), call(json!("not json")));
        let text = Capabilities { object_arguments: false, ..ALL };
        check(text, call(json!("{\"b\":1}")), call(json!("{\"b\":1}")));
    }

    #[test]
    fn system_messages_move_where_they_are_unknown() {
        let no_system = Capabilities { system_role: false, ..ALL };
        let messages =
            json!([{ "role": "system", "content": "be brief" }, { "role": "user", "content": "hi" }]);
        check(no_system, messages, json!([{ "role": "user", "content": "be brief\n\nhi" }]));
        check(
            no_system,
            json!([{ "role": "system", "content": "s" }]),
            json!([{ "role": "user", "content": "s" }]),
        );
    }

    #[test]
    fn bad_messages_are_named() {
        let message = |messages: Value| prepare(&messages, &ALL).unwrap_err().to_string();
        assert_eq!(message(json!("hi")), "messages: expected an array, found a string");
        assert_eq!(message(json!([1])), "messages: message 0: expected an object, found a number");
        assert_eq!(message(json!([{ "content": "" }])), "messages: message 0: expected a string `role`");
        assert!(message(json!([{ "role": "user", "content": 1 }])).contains("found a number"));
        let image = json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }]);
        assert!(message(image).contains("`image_url` are not supported"));
    }
}
