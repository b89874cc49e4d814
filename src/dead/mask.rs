//! What may be shown of a body: its structure and the names of its fields. Values can be anything, a secret included.

use serde_json::Value;

/// A body without its values: texts and numbers are told by their length.
pub fn masked(body: &[u8]) -> Value {
    match serde_json::from_slice(body) {
        Ok(value) => mask(value),
        Err(_) => Value::String(format!("({} bytes that are no JSON)", body.len())),
    }
}

/// A body as it is: JSON, else text, else base64.
pub fn whole(body: &[u8]) -> Value {
    use base64::Engine as _;
    serde_json::from_slice(body).unwrap_or_else(|_| {
        Value::String(std::str::from_utf8(body).map_or_else(
            |_| format!("base64:{}", base64::engine::general_purpose::STANDARD.encode(body)),
            str::to_owned,
        ))
    })
}

/// A text told by its length.
pub fn masked_text(text: &str) -> String {
    match text.chars().count() {
        1 => "(1 character)".into(),
        count => format!("({count} characters)"),
    }
}

fn mask(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(masked_text(&text)),
        Value::Number(number) => Value::String(format!("(a number of {} characters)", number.to_string().len())),
        Value::Array(items) => Value::Array(items.into_iter().map(mask).collect()),
        Value::Object(fields) => Value::Object(fields.into_iter().map(|(name, value)| (name, mask(value))).collect()),
        // Two values and none: they hold nothing.
        plain @ (Value::Null | Value::Bool(_)) => plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_stay_and_values_go() {
        let body = json!({"id": "r1", "n": -17.5, "deep": [{"password": "hunter2"}, null, true], "empty": ""});
        let masked = masked(body.to_string().as_bytes());
        assert_eq!(
            masked,
            json!({
                "id": "(2 characters)", "n": "(a number of 5 characters)",
                "deep": [{"password": "(7 characters)"}, null, true], "empty": "(0 characters)",
            })
        );
    }

    #[test]
    fn a_body_that_is_no_json_is_told_by_its_length() {
        assert_eq!(masked(b"hunter2"), json!("(7 bytes that are no JSON)"));
        assert_eq!(masked(b"\xff"), json!("(1 bytes that are no JSON)"));
        assert_eq!(whole(b"hunter2"), json!("hunter2"));
        assert_eq!(whole(b"\xff"), json!("base64:/w=="));
        assert_eq!(whole(br#"{"a":1}"#), json!({"a": 1}));
    }
}
