//! Typed access to the fields of a JSON body: `null` counts as absent, unknown fields are nobody's business, and a
//! value of the wrong type is refused in words that name the field.

use serde_json::{Map, Value};

use crate::error::ApiError;

/// The fields of an object, with the path that leads to it.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: &'a str,
}

impl<'a> Fields<'a> {
    /// The fields of a request's body.
    pub fn of_body(body: &'a Value) -> Result<Fields<'a>, ApiError> {
        match body {
            Value::Object(map) => Ok(Fields { map, path: "" }),
            other => {
                Err(ApiError::invalid(format!("the body: expected a JSON object, found {}", show(other))))
            }
        }
    }

    fn error(&self, name: &str, expected: &str, found: &Value) -> ApiError {
        ApiError::field(&format!("{}{name}", self.path), expected, show(found))
    }

    /// The value, unless it is absent or null.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// The first of several spellings that is there.
    pub fn any<T>(
        &self,
        names: &[&str],
        get: impl Fn(&Self, &str) -> Result<Option<T>, ApiError>,
    ) -> Result<Option<T>, ApiError> {
        for name in names {
            if let Some(value) = get(self, name)? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    pub fn bool(&self, name: &str) -> Result<Option<bool>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.error(name, "true or false", value))
    }

    pub fn number(&self, name: &str) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.error(name, "a number", value))
    }

    /// An integer, also one written as `40.0`.
    pub fn integer(&self, name: &str) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        integer(value).map(Some).ok_or_else(|| self.error(name, "an integer", value))
    }

    /// An integer of at least `low`.
    pub fn integer_from(&self, name: &str, low: i64) -> Result<Option<i64>, ApiError> {
        match self.integer(name)? {
            Some(n) if n < low => Err(ApiError::field(
                &format!("{}{name}", self.path),
                &format!("an integer of at least {low}"),
                n,
            )),
            n => Ok(n),
        }
    }

    pub fn string(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.error(name, "a string", value))
    }

    /// A string, or a list of them.
    pub fn strings(&self, name: &str) -> Result<Option<Vec<String>>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let texts = match value {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(list) => list.iter().map(|v| v.as_str().map(str::to_owned)).collect(),
            _ => None,
        };
        texts.map(Some).ok_or_else(|| self.error(name, "a string or a list of strings", value))
    }

    pub fn array(&self, name: &str) -> Result<Option<&'a Vec<Value>>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_array().map(Some).ok_or_else(|| self.error(name, "a list", value))
    }

    /// The fields of an object inside. `path` is its name with a trailing dot, for messages.
    pub fn object(&self, name: &str, path: &'a str) -> Result<Option<Fields<'a>>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value {
            Value::Object(map) => Ok(Some(Fields { map, path })),
            other => Err(self.error(name, "an object", other)),
        }
    }

    /// The object itself.
    pub fn map(&self) -> &'a Map<String, Value> {
        self.map
    }
}

/// An integer, also one written as `40.0`.
pub(crate) fn integer(value: &Value) -> Option<i64> {
    let whole = |x: &f64| x.fract() == 0.0 && x.abs() < 9.0e15;
    value.as_i64().or_else(|| value.as_f64().filter(whole).map(|x| x as i64))
}

/// A value for an error message: its kind, and as much of it as fits a line.
pub(crate) fn show(value: &Value) -> String {
    let kind = match value {
        Value::Null => return "null".into(),
        Value::Bool(_) | Value::Number(_) => "",
        Value::String(_) => "the string ",
        Value::Array(_) => "the list ",
        Value::Object(_) => "the object ",
    };
    let mut text = value.to_string();
    if let Some((end, _)) = text.char_indices().nth(60) {
        text.truncate(end);
        text.push('…');
    }
    format!("{kind}{text}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check<T: std::fmt::Debug + PartialEq>(
        body: Value,
        get: impl Fn(Fields<'_>) -> Result<T, ApiError>,
        expected: Result<T, &str>,
    ) {
        let got = Fields::of_body(&body).and_then(get);
        let got = got.map_err(|e| e.body()["error"]["message"].as_str().unwrap_or_default().to_owned());
        assert_eq!(got, expected.map_err(str::to_owned));
    }

    #[test]
    fn null_is_absent_and_wrong_types_are_named() {
        check(json!({"a": null}), |f| f.bool("a"), Ok(None));
        check(json!({"a": 40.0}), |f| f.integer("a"), Ok(Some(40)));
        check(json!({"a": 4.5}), |f| f.integer("a"), Err("`a`: expected an integer, found 4.5"));
        check(json!({"a": "x"}), |f| f.number("a"), Err("`a`: expected a number, found the string \"x\""));
        check(
            json!({"a": -5}),
            |f| f.integer_from("a", -1),
            Err("`a`: expected an integer of at least -1, found -5"),
        );
        check(
            json!({"a": ["x", 1]}),
            |f| f.strings("a"),
            Err("`a`: expected a string or a list of strings, found the list [\"x\",1]"),
        );
        check(
            json!({"a": {"b": 1}}),
            |f| f.object("a", "a.")?.map_or(Ok(None), |a| a.bool("b")),
            Err("`a.b`: expected true or false, found 1"),
        );
        check(json!([]), |f| f.bool("a"), Err("the body: expected a JSON object, found the list []"));
    }

    #[test]
    fn long_values_are_cut_between_characters() {
        assert_eq!(show(&json!("é".repeat(100))).chars().count(), "the string ".len() + 61);
    }
}
