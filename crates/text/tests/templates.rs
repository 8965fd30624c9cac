//! Whole conversations through templates in the style of well-known families.
//!
//! The templates were written for these tests: they use what the published ones use (namespaces, macros, reversed
//! slices, `tojson`, Python's string methods), in other words.

use paceline_gguf::Metadata;
use paceline_text::{Capabilities, ChatTemplate, Error, RenderRequest, TokenTable, TokenizerModel, Vocab};
use serde_json::{Value, json};

/// Thinking, tools, and thoughts dropped from turns before the last question.
const QWEN_LIKE: &str = r#"
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- '# Tools\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set state = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if state.searching and message.role == 'user' and message.content is string %}
        {%- set state.searching = false %}
        {%- set state.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > state.last and thought %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{% set call = call.function %}{% endif %}
            {{- '\n<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"#;

/// Headers, a date, and content that must be text.
const LLAMA_LIKE: &str = r#"{{- bos_token }}
{%- if date_string is not defined %}
    {%- set date_string = strftime_now('%d %b %Y') %}
{%- endif %}
{%- macro turn(role, text) -%}
    {{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' ~ text | trim ~ '<|eot_id|>' }}
{%- endmacro %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- turn('system', 'Today: ' ~ date_string ~ '\n\n' ~ system) }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('one tool call at a time') }}
        {%- endif %}
        {{- turn('assistant', message.tool_calls[0].function | tojson) }}
    {%- else %}
        {{- turn(message['role'], message['content']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"#;

/// No system role, strict turns, the assistant called model, content as text or parts.
const GEMMA_LIKE: &str = r#"{{ bos_token }}
{%- for message in messages -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('turns must alternate between user and assistant') }}
    {%- endif -%}
    {%- set role = 'model' if message.role == 'assistant' else message.role -%}
    {{ '<start_of_turn>' + role + '\n' }}
    {%- if message.content is string -%}
        {{ message.content | trim }}
    {%- elif message.content is iterable -%}
        {%- for part in message.content -%}
            {%- if part.type == 'text' -%}{{ part.text | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"#;

fn render(
    template: &ChatTemplate,
    messages: Value,
    tools: Option<Value>,
    kwargs: Value,
) -> Result<String, Error> {
    template.render(&RenderRequest {
        messages: &messages,
        tools: tools.as_ref(),
        add_generation_prompt: true,
        kwargs: kwargs.as_object().unwrap(),
    })
}

fn check(template: &ChatTemplate, messages: Value, expected: &str) {
    assert_eq!(render(template, messages, None, json!({})).unwrap(), expected);
}

fn qwen() -> ChatTemplate {
    ChatTemplate::new(QWEN_LIKE, "", "<|im_end|>").unwrap()
}

#[test]
fn qwen_conversation() {
    let messages = json!([
        { "role": "system", "content": "Be brief." },
        { "role": "user", "content": "2+2?" },
        { "role": "assistant", "content": "<think>\neasy\n</think>\n\n4" },
        { "role": "user", "content": "<b> & é?" },
    ]);
    check(
        &qwen(),
        messages,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n\
         <|im_start|>user\n<b> & é?<|im_end|>\n<|im_start|>assistant\n",
    );
}

#[test]
fn qwen_tools_and_their_answers() {
    let tools =
        json!([{ "type": "function", "function": { "name": "add", "parameters": { "b": 1, "a": "<é>" } } }]);
    let messages = json!([
        { "role": "user", "content": [{ "type": "text", "text": "add" }, { "type": "text", "text": "it" }] },
        { "role": "assistant", "content": null, "reasoning_content": "must add", "tool_calls": [
            { "id": "1", "type": "function", "function": { "name": "add", "arguments": "{\"y\":1, \"x\":\"é\"}" } } ] },
        { "role": "tool", "tool_call_id": "1", "content": "3" },
        { "role": "tool", "tool_call_id": "2", "content": "4" },
    ]);
    assert_eq!(
        render(&qwen(), messages, Some(tools), json!({ "enable_thinking": false })).unwrap(),
        "<|im_start|>system\n# Tools\n<tools>\n\
         {\"type\": \"function\", \"function\": {\"name\": \"add\", \"parameters\": {\"b\": 1, \"a\": \"<é>\"}}}\n\
         </tools><|im_end|>\n<|im_start|>user\nadd\nit<|im_end|>\n\
         <|im_start|>assistant\n<think>\nmust add\n</think>\n\n\n\
         <tool_call>\n{\"name\": \"add\", \"arguments\": {\"y\": 1, \"x\": \"é\"}}\n</tool_call><|im_end|>\n\
         <|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n\
         <|im_start|>assistant\n<think>\n\n</think>\n\n"
    );
}

#[test]
fn llama_conversation() {
    let template = ChatTemplate::new(LLAMA_LIKE, "<|begin_of_text|>", "<|eot_id|>").unwrap();
    let messages =
        json!([{ "role": "system", "content": " Be brief. " }, { "role": "user", "content": "hi" }]);
    assert_eq!(
        render(&template, messages, None, json!({ "date_string": "1 Jan 2026" })).unwrap(),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 1 Jan 2026\n\nBe brief.<|eot_id|>\
         <|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    );
    let call = json!({ "function": { "name": "f", "arguments": "{}" } });
    let messages =
        json!([{ "role": "user", "content": "hi" }, { "role": "assistant", "tool_calls": [call, call] }]);
    let error = render(&template, messages, None, json!({})).unwrap_err();
    assert!(
        matches!(&error, Error::TemplateRaised { message, .. } if message == "one tool call at a time"),
        "{error}"
    );
}

#[test]
fn gemma_conversation() {
    let template = ChatTemplate::new(GEMMA_LIKE, "<bos>", "<eos>").unwrap();
    let messages = json!([
        { "role": "system", "content": "Be brief." },
        { "role": "user", "content": [{ "type": "text", "text": "hi " }] },
        { "role": "assistant", "content": "yo" },
        { "role": "user", "content": "bye" },
    ]);
    check(
        &template,
        messages,
        "<bos><start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n<start_of_turn>model\nyo<end_of_turn>\n\
         <start_of_turn>user\nbye<end_of_turn>\n<start_of_turn>model\n",
    );
    let twice = json!([{ "role": "user", "content": "a" }, { "role": "user", "content": "b" }]);
    let message = render(&template, twice, None, json!({})).unwrap_err().to_string();
    assert!(message.ends_with("turns must alternate between user and assistant"), "{message}");
}

#[test]
fn capabilities() {
    let of = |source: &str| *ChatTemplate::new(source, "", "").unwrap().capabilities();
    let qwen = Capabilities {
        system_role: true,
        tools: true,
        tool_calls: true,
        object_arguments: true,
        enable_thinking: true,
        string_content: true,
        content_parts: false,
    };
    assert_eq!(of(QWEN_LIKE), qwen);
    assert_eq!(of(LLAMA_LIKE), Capabilities { tools: false, enable_thinking: false, ..qwen });
    let plain = Capabilities { tools: false, tool_calls: false, enable_thinking: false, ..qwen };
    assert_eq!(of(GEMMA_LIKE), Capabilities { system_role: false, content_parts: true, ..plain });
    // Prints the list itself, which shows the text but is no support.
    assert_eq!(of("{% for m in messages %}{{ m.content }}{% endfor %}"), plain);
    let parts_only = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}";
    assert_eq!(of(parts_only), Capabilities { string_content: false, content_parts: true, ..plain });
    // Appends arguments to text, which an object cannot be.
    let text_arguments = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ 'f ' + c.function.arguments }}{% endfor %}{% endfor %}";
    assert_eq!(of(text_arguments), Capabilities { tool_calls: true, object_arguments: false, ..plain });
}

/// The template of the bundled model.
#[test]
fn bundled_conversation() {
    let source = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}\
                  {%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}\
                  {%- if enable_thinking is defined and enable_thinking is false %}\
                  {{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}";
    let template = ChatTemplate::new(source, "", "<|im_end|>").unwrap();
    let messages = || json!([{ "role": "user", "content": "Tell me a story.\n" }]);
    check(&template, messages(), "<|im_start|>user\nTell me a story.\n<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(
        render(&template, messages(), None, json!({ "enable_thinking": false })).unwrap(),
        "<|im_start|>user\nTell me a story.\n<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    );
    assert!(template.capabilities().enable_thinking && !template.is_fallback());
}

#[test]
fn files_without_a_template_get_chatml() {
    let mut table = TokenTable::new(TokenizerModel::ByteLevelBpe);
    table.tokens = ["<s>", "</s>"].into_iter().collect();
    table.special.bos = Some(0);
    let vocab = Vocab::new(&table).unwrap();
    let mut metadata = Metadata::new();
    let template = ChatTemplate::from_metadata(&metadata, &vocab).unwrap();
    assert!(template.is_fallback());
    check(
        &template,
        json!([{ "role": "user", "content": "hi" }]),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    );

    metadata.insert("tokenizer.chat_template", "{{ bos_token }}|{{ eos_token }}|{{ messages[0].content }}");
    let template = ChatTemplate::from_metadata(&metadata, &vocab).unwrap();
    assert!(!template.is_fallback());
    check(&template, json!([{ "role": "user", "content": "hi" }]), "<s>||hi");
}

#[test]
fn kwargs_cannot_replace_the_messages() {
    let template = ChatTemplate::new("{{ messages[0].content }}{{ style }}", "", "").unwrap();
    let got = render(
        &template,
        json!([{ "role": "user", "content": "hi" }]),
        None,
        json!({ "messages": [], "style": "!" }),
    );
    assert_eq!(got.unwrap(), "hi!");
}
