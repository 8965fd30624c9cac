//! JSON as Python's `json.dumps` writes it, which is what chat templates mean by `tojson`: a space after commas and
//! colons, nothing escaped for HTML, text beyond ASCII as it is, keys in the order they came.

use std::fmt::Write;

use serde_json::Value;

/// The arguments of `json.dumps` that templates use.
#[derive(Clone, Debug)]
pub(crate) struct Style {
    /// Spaces for each level; `None` writes one line.
    pub indent: Option<usize>,
    /// Between entries, and between a key and its value.
    pub separators: (String, String),
    /// Keys in the order of their code points.
    pub sort_keys: bool,
    /// `\u` escapes beyond ASCII.
    pub ensure_ascii: bool,
}

impl Style {
    /// `json.dumps(x, ensure_ascii=False, indent=indent)`.
    pub fn indented(indent: Option<usize>) -> Style {
        let comma = if indent.is_some() { "," } else { ", " };
        Style {
            indent,
            separators: (comma.to_owned(), ": ".to_owned()),
            sort_keys: false,
            ensure_ascii: false,
        }
    }
}

/// `value` as JSON.
pub(crate) fn dumps(value: &Value, style: &Style) -> String {
    let mut out = String::new();
    write_value(&mut out, value, style, 0);
    out
}

fn write_value(out: &mut String, value: &Value, style: &Style, depth: usize) {
    match value {
        Value::String(text) => write_string(out, text, style),
        Value::Array(items) => {
            let write = |out: &mut String, item: &&Value| write_value(out, item, style, depth + 1);
            write_entries(out, ('[', ']'), &items.iter().collect::<Vec<_>>(), style, depth, write);
        }
        Value::Object(map) => {
            let mut entries: Vec<(&String, &Value)> = map.iter().collect();
            if style.sort_keys {
                entries.sort_by_key(|(key, _)| *key);
            }
            let write = |out: &mut String, (key, value): &(&String, &Value)| {
                write_string(out, key, style);
                out.push_str(&style.separators.1);
                write_value(out, value, style, depth + 1);
            };
            write_entries(out, ('{', '}'), &entries, style, depth, write);
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

fn write_entries<T>(
    out: &mut String,
    (open, close): (char, char),
    entries: &[T],
    style: &Style,
    depth: usize,
    write: impl Fn(&mut String, &T),
) {
    let new_line = |out: &mut String, depth: usize| {
        if let Some(indent) = style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    out.push(open);
    for (i, entry) in entries.iter().enumerate() {
        if i > 0 {
            out.push_str(&style.separators.0);
        }
        new_line(out, depth + 1);
        write(out, entry);
    }
    if !entries.is_empty() {
        new_line(out, depth);
    }
    out.push(close);
}

fn write_string(out: &mut String, text: &str, style: &Style) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            _ if c < ' ' || (style.ensure_ascii && c > '~') => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}").expect("writing to a string");
                }
            }
            _ => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(style: Style, json: &str, expected: &str) {
        assert_eq!(dumps(&serde_json::from_str(json).unwrap(), &style), expected);
    }

    #[test]
    fn as_python_writes_it() {
        let json = r#"{"b":[1,2.5,{}],"a":"<é>&'\"\n\u0001","n":null,"t":true,"e":[]}"#;
        check(
            Style::indented(None),
            json,
            r#"{"b": [1, 2.5, {}], "a": "<é>&'\"\n\u0001", "n": null, "t": true, "e": []}"#,
        );
        let sorted = Style { sort_keys: true, ensure_ascii: true, ..Style::indented(None) };
        check(sorted, r#"{"b":"é😀","a":1}"#, r#"{"a": 1, "b": "\u00e9\ud83d\ude00"}"#);
        check(
            Style::indented(Some(2)),
            r#"{"a":[1,2],"b":{}}"#,
            "{\n  \"a\": [\n    1,\n    2\n  ],\n  \"b\": {}\n}",
        );
    }
}
