//! Finds out what a template can do, by giving it small conversations with words that no template contains.

use serde_json::{Map, Value, json};

use super::Capabilities;
use super::engine::Engine;

const NEEDLE: &str = "q7Xneedle";

pub(super) fn probe(engine: &Engine) -> Capabilities {
    let render = |messages: Value, tools: Option<Value>, kwargs: Value| {
        let kwargs = kwargs.as_object().cloned().unwrap_or_else(Map::new);
        engine.render(messages, tools.as_ref(), true, &kwargs).ok()
    };
    let shows = |rendered: &Option<String>| rendered.as_ref().is_some_and(|text| text.contains(NEEDLE));

    let as_string = render(json!([{ "role": "user", "content": NEEDLE }]), None, json!({}));
    let as_parts =
        render(json!([{ "role": "user", "content": [{ "type": "text", "text": NEEDLE }] }]), None, json!({}));
    let parts_only = !shows(&as_string) && shows(&as_parts);
    // A template that prints the list as it is shows the word too, but not the same text.
    let content_parts = parts_only || (shows(&as_parts) && as_parts == as_string);

    // From here on, content takes the form that works.
    let text = |text: &str| if parts_only { json!([{ "type": "text", "text": text }]) } else { json!(text) };
    let user = json!({ "role": "user", "content": text("hi") });
    let system = render(json!([{ "role": "system", "content": text(NEEDLE) }, user]), None, json!({}));
    let tools = json!([{ "type": "function", "function": {
        "name": NEEDLE, "description": "d", "parameters": { "type": "object", "properties": {} } } }]);
    let tools = render(json!([user]), Some(tools), json!({}));
    let call = |arguments: Value| {
        let call = json!({ "id": "call_00001", "type": "function", "function": { "name": "f", "arguments": arguments } });
        let assistant = json!({ "role": "assistant", "content": text(""), "tool_calls": [call] });
        let answer =
            json!({ "role": "tool", "tool_call_id": "call_00001", "name": "f", "content": text("42") });
        render(json!([user, assistant, answer]), None, json!({}))
    };
    let with_object = shows(&call(json!({ "k": NEEDLE })));
    let with_text = shows(&call(json!(format!("{{\"k\": \"{NEEDLE}\"}}"))));
    let thinking = |on: bool| render(json!([user]), None, json!({ "enable_thinking": on }));

    Capabilities {
        // A template that fails even on a plain message says nothing about system messages.
        system_role: shows(&system) || !(shows(&as_string) || shows(&as_parts)),
        tools: shows(&tools),
        tool_calls: with_object || with_text,
        object_arguments: with_object || !with_text,
        enable_thinking: thinking(true) != thinking(false),
        string_content: !parts_only,
        content_parts,
    }
}
