//! Token ids against Hugging Face's `tokenizers` and Google's `sentencepiece` over awkward strings.
//!
//! `goldens/text/make.py` made the files and says what is in them. There is no tolerance: ids are equal or wrong.

use std::path::Path;

use paceline_gguf::Metadata;
use paceline_text::{Encode, PRETOKENIZERS, Token, Tokenizer};
use serde_json::Value;

const PARSED: Encode = Encode { add_bos: false, parse_special: true };
const PLAIN: Encode = Encode { add_bos: false, parse_special: false };

fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/text").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// An array of strings, or a string of them with `separator` between.
fn list(value: &Value, separator: char) -> Vec<String> {
    match value {
        Value::String(text) => text.split(separator).map(str::to_owned).collect(),
        _ => strings(value),
    }
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().expect("an array").iter().map(|s| s.as_str().expect("a string").to_owned()).collect()
}

fn ids(value: &Value) -> Vec<Token> {
    value.as_array().expect("an array").iter().map(|id| id.as_u64().expect("an id") as Token).collect()
}

/// The tokenizer of a golden file, through the keys that a GGUF file would hold.
fn tokenizer(golden: &Value, pre: Option<&str>) -> Tokenizer {
    let mut tokens = list(&golden["tokens"], ' ');
    let mut kinds = match golden["kinds"].as_array() {
        Some(kinds) => kinds.iter().map(|k| k.as_i64().unwrap() as i32).collect(),
        None => tokens.iter().map(|text| if is_byte(golden, text) { 6 } else { 1 }).collect::<Vec<i32>>(),
    };
    for (key, kind) in [("control", 3), ("user_defined", 4)] {
        for text in golden.get(key).map(strings).unwrap_or_default() {
            match tokens.iter().position(|known| *known == text) {
                Some(id) => kinds[id] = kind,
                None => {
                    tokens.push(text);
                    kinds.push(kind);
                }
            }
        }
    }
    let mut metadata = Metadata::for_file("golden");
    metadata.insert("tokenizer.ggml.model", golden["model"].as_str().unwrap());
    if let Some(pre) = pre {
        metadata.insert("tokenizer.ggml.pre", pre);
    }
    if let Some(unknown) = tokens.iter().position(|text| text == "<unk>") {
        metadata.insert("tokenizer.ggml.unknown_token_id", unknown as u32);
    }
    if let Some(merges) = golden.get("merges") {
        metadata.insert("tokenizer.ggml.merges", list(merges, '\n'));
    }
    if let Some(scores) = golden.get("scores") {
        let scores: Vec<f32> =
            scores.as_array().unwrap().iter().map(|s| s.as_f64().unwrap() as f32).collect();
        metadata.insert("tokenizer.ggml.scores", scores);
    }
    metadata.insert("tokenizer.ggml.tokens", tokens);
    metadata.insert("tokenizer.ggml.token_type", kinds);
    Tokenizer::from_metadata(&metadata).unwrap()
}

/// In `gemma4`, `<0x00>` … `<0xFF>` are typed as bytes.
fn is_byte(golden: &Value, text: &str) -> bool {
    golden["model"] == "gemma4" && text.len() == 6 && text.starts_with("<0x")
}

/// Ids with special tokens parsed and, where the file has them, as plain text; and back to text.
fn check(name: &str, n_strings: usize, skip: impl Fn(&str) -> bool) {
    let golden = golden(name);
    let texts = strings(&golden["strings"]);
    assert!(texts.len() >= n_strings, "{name}: only {} strings", texts.len());
    for (pre, want) in golden["pre"].as_object().unwrap() {
        let tokenizer = tokenizer(&golden, Some(pre));
        for (i, text) in texts.iter().enumerate().filter(|(_, text)| !skip(text)) {
            let parsed = tokenizer.encode(text, PARSED);
            assert_eq!(parsed, ids(&want["ids"][i]), "{name} {pre}: {text:?}");
            let plain = want["plain"].get(i.to_string()).unwrap_or(&want["ids"][i]);
            assert_eq!(tokenizer.encode(text, PLAIN), ids(plain), "{name} {pre}: {text:?} as plain text");
            assert_eq!(tokenizer.decode(&parsed), *text, "{name} {pre}: back to text");
        }
    }
    let tokenizer = tokenizer(&golden, None);
    for case in golden.get("decode").and_then(Value::as_array).into_iter().flatten() {
        assert_eq!(tokenizer.decode(&ids(&case[0])), case[1], "{name}: {:?}", case[0]);
    }
}

#[test]
fn byte_level_ids() {
    check("byte_level.json", 300, |_| false);
}

#[test]
fn bundled_ids() {
    check("bundled.json", 300, |_| false);
}

#[test]
fn gemma4_ids() {
    // U+2581 reads back as the space that it stands for.
    check("gemma4.json", 300, |text| text.contains('\u{2581}'));
}

#[test]
fn pieces() {
    let golden = golden("byte_level.json");
    let texts = strings(&golden["strings"]);
    for (name, want) in golden["pre"].as_object().unwrap() {
        let pre = PRETOKENIZERS.iter().find(|pre| pre.names.contains(&name.as_str())).unwrap();
        for (i, text) in texts.iter().enumerate() {
            let lengths: Vec<Token> = pre.split(text).map(|piece| piece.chars().count() as Token).collect();
            assert_eq!(lengths, ids(&want["pieces"][i]), "{name}: {text:?}");
        }
    }
}

#[test]
fn spm_ids() {
    let golden = golden("spm.json");
    let tokenizer = tokenizer(&golden, None);
    let texts = strings(&golden["strings"]);
    assert!(texts.len() >= 300);
    for (i, text) in texts.iter().enumerate() {
        assert_eq!(tokenizer.encode(text, PLAIN), ids(&golden["ids"][i]), "{text:?}");
        if !text.is_empty() && !text.contains('\u{2581}') {
            let decoded = tokenizer.decode(&tokenizer.encode(text, PLAIN));
            assert_eq!(decoded, format!(" {text}"), "back to text");
        }
    }
}
