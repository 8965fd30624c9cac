//! The forms in which a prompt may come, turned into token ids.
//!
//! | JSON                                 | meaning                         |
//! |--------------------------------------|---------------------------------|
//! | `"text"`                             | text                            |
//! | `[1, 2, 3]`                          | token ids                       |
//! | `["text", 7, "more"]`                | text and ids in turn            |
//! | `{"prompt_string": "text"}`          | text (with room for media)      |
//! | a list of strings, lists or objects  | several prompts                 |

use paceline_engine::Token;
use paceline_text::{Encode, Tokenizer};
use serde_json::Value;

use crate::{
    error::ApiError,
    fields::{integer, show},
};

/// The prompts in `value`, and whether they came as a list of prompts.
pub(crate) fn prompts(tokenizer: &Tokenizer, value: &Value) -> Result<(Vec<Vec<Token>>, bool), ApiError> {
    match value {
        Value::Array(list) if !list.is_empty() && !is_one_prompt(list) => {
            let prompts = list.iter().enumerate().map(|(i, v)| one(tokenizer, v, &format!("prompt[{i}]")));
            Ok((prompts.collect::<Result<_, _>>()?, true))
        }
        value => Ok((vec![one(tokenizer, value, "prompt")?], false)),
    }
}

/// A list with a number in it is one prompt; a list of strings alone is several.
fn is_one_prompt(list: &[Value]) -> bool {
    let flat = list.iter().all(|v| v.is_number() || v.is_string());
    flat && list.iter().any(Value::is_number)
}

fn one(tokenizer: &Tokenizer, value: &Value, name: &str) -> Result<Vec<Token>, ApiError> {
    match value {
        Value::String(text) => Ok(encode(tokenizer, text, true)),
        Value::Array(list) => {
            let mut tokens = Vec::with_capacity(list.len());
            for (i, part) in list.iter().enumerate() {
                match part {
                    Value::String(text) => tokens.extend(encode(tokenizer, text, i == 0)),
                    part => tokens.push(token(tokenizer, part, &format!("{name}[{i}]"))?),
                }
            }
            Ok(tokens)
        }
        Value::Object(object) => {
            let media = object.get("multimodal_data").and_then(Value::as_array);
            if media.is_some_and(|list| !list.is_empty()) {
                return Err(ApiError::invalid(format!(
                    "`{name}.multimodal_data`: this model takes text only, no images or sound"
                )));
            }
            match object.get("prompt_string") {
                Some(Value::String(text)) => Ok(encode(tokenizer, text, true)),
                other => Err(ApiError::field(
                    &format!("{name}.prompt_string"),
                    "a string",
                    other.map_or("nothing".into(), show),
                )),
            }
        }
        other => Err(ApiError::field(
            name,
            "a string, a list of token ids, a mix of both, or a list of such prompts",
            show(other),
        )),
    }
}

fn encode(tokenizer: &Tokenizer, text: &str, add_bos: bool) -> Vec<Token> {
    tokenizer.encode(text, Encode { add_bos, parse_special: true })
}

/// The token id in `value`.
pub(crate) fn token(tokenizer: &Tokenizer, value: &Value, name: &str) -> Result<Token, ApiError> {
    let n_vocab = tokenizer.vocab().len();
    integer(value)
        .and_then(|id| Token::try_from(id).ok())
        .filter(|&id| (id as usize) < n_vocab)
        .ok_or_else(|| ApiError::field(name, &format!("a token id from 0 to {}", n_vocab - 1), show(value)))
}

#[cfg(test)]
mod tests {
    use paceline_testkit::tiny_metadata;
    use serde_json::json;

    use super::*;

    fn check(value: Value, expected: Result<(&[&[Token]], bool), &str>) {
        let tokenizer = Tokenizer::from_metadata(&tiny_metadata()).unwrap();
        let got = prompts(&tokenizer, &value)
            .map_err(|e| e.body()["error"]["message"].as_str().unwrap_or_default().to_owned());
        let expected = expected
            .map(|(prompts, many)| (prompts.iter().map(|p| p.to_vec()).collect(), many))
            .map_err(str::to_owned);
        assert_eq!(got, expected);
    }

    #[test]
    fn forms() {
        check(json!("zy"), Ok((&[&[122, 121]], false)));
        check(json!([1, 2]), Ok((&[&[1, 2]], false)));
        check(json!(["z", 7, "y"]), Ok((&[&[122, 7, 121]], false)));
        check(json!(["z", "y"]), Ok((&[&[122], &[121]], true)));
        check(json!([[1, 2], "z", {"prompt_string": "y"}]), Ok((&[&[1, 2], &[122], &[121]], true)));
        check(json!([]), Ok((&[&[]], false)));
        check(json!("z<|im_end|>"), Ok((&[&[122, paceline_testkit::IM_END]], false)));
    }

    #[test]
    fn refusals() {
        let what = "a string, a list of token ids, a mix of both, or a list of such prompts";
        check(json!(7), Err(&format!("`prompt`: expected {what}, found 7")));
        check(json!([[1, -2]]), Err("`prompt[0][1]`: expected a token id from 0 to 265, found -2"));
        check(json!([1, 266]), Err("`prompt[1]`: expected a token id from 0 to 265, found 266"));
        check(json!([1, 2.5]), Err("`prompt[1]`: expected a token id from 0 to 265, found 2.5"));
        check(json!({}), Err("`prompt.prompt_string`: expected a string, found nothing"));
        check(
            json!({"prompt_string": "a", "multimodal_data": ["x"]}),
            Err("`prompt.multimodal_data`: this model takes text only, no images or sound"),
        );
    }
}
