//! The fields of one JSON object: no duplicates, no NUL, no value ever repeated in an error.

use crate::job::{Refusal, RefusalCode};
use serde::de::{DeserializeSeed, Error as _, MapAccess, Visitor};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;

/// Fields are taken out as they are read.
pub(super) struct Fields(BTreeMap<String, Value>);

impl Fields {
    /// Reads an object. Serde's own messages quote values, so none of them is passed on.
    pub(super) fn read(body: &[u8]) -> Result<Self, Refusal> {
        let text =
            std::str::from_utf8(body).map_err(|_| Refusal::whole(RefusalCode::NotUtf8, "the message is not UTF-8"))?;
        if text.contains('\0') {
            return Err(nul());
        }
        let mut duplicate = None;
        let mut reader = serde_json::Deserializer::from_str(text);
        let read = TopLevel { duplicate: &mut duplicate }.deserialize(&mut reader).and_then(|read| {
            reader.end()?;
            Ok(read)
        });
        if let Some(name) = duplicate {
            let name = shown(&name);
            return Err(Refusal::of(&name, RefusalCode::DuplicateField, format!("{name}: given more than once")));
        }
        let fields = read
            .map_err(|error| {
                let (line, column) = (error.line(), error.column());
                let message = format!("the message is not JSON (line {line}, column {column})");
                Refusal::whole(RefusalCode::NotJson, message)
            })?
            .ok_or_else(|| Refusal::whole(RefusalCode::NotAnObject, "expected a JSON object"))?;
        if fields.iter().any(|(name, value)| name.contains('\0') || holds_nul(value)) {
            return Err(nul());
        }
        Ok(Self(fields))
    }

    /// Refuses every field that is not in `known`.
    pub(super) fn only(&self, known: &[&str]) -> Result<(), Refusal> {
        match self.0.keys().find(|name| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => {
                let name = shown(name);
                let message = format!("{name}: no such field; expected {}", known.join(", "));
                Err(Refusal::of(&name, RefusalCode::UnknownField, message))
            }
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// A string field, left where it is.
    pub(super) fn peek(&self, name: &str) -> Option<&str> {
        self.0.get(name).and_then(Value::as_str)
    }

    pub(super) fn optional_string(&mut self, name: &str) -> Result<Option<String>, Refusal> {
        match self.0.get_mut(name).map(Value::take) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(wrong_type(name, "a string")),
        }
    }

    pub(super) fn required_string(&mut self, name: &str) -> Result<String, Refusal> {
        self.optional_string(name)?
            .ok_or_else(|| Refusal::of(name, RefusalCode::MissingField, format!("{name}: required")))
    }

    pub(super) fn optional_bool(&mut self, name: &str) -> Result<Option<bool>, Refusal> {
        match self.0.get(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(wrong_type(name, "true or false")),
        }
    }

    /// The fields of an object inside.
    pub(super) fn object(&mut self, name: &str) -> Option<Self> {
        match self.0.get_mut(name).map(Value::take) {
            Some(Value::Object(inner)) => Some(Self(inner.into_iter().collect())),
            _ => None,
        }
    }
}

fn nul() -> Refusal {
    Refusal::whole(RefusalCode::NulCharacter, "the message holds a NUL character; Postgres stores none")
}

fn wrong_type(name: &str, expected: &str) -> Refusal {
    Refusal::of(name, RefusalCode::WrongType, format!("{name}: expected {expected}"))
}

/// A field's name as far as it may be shown: a stranger chose it.
fn shown(name: &str) -> String {
    let plain = !name.is_empty()
        && name.len() <= 64
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'));
    if plain { name.to_owned() } else { "(unprintable)".to_owned() }
}

fn holds_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(items) => items.iter().any(holds_nul),
        Value::Object(fields) => fields.iter().any(|(name, value)| name.contains('\0') || holds_nul(value)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Reads any JSON value, keeping an object's fields and noting a field at any depth that stands twice:
/// two readers of such a message could see two requests.
struct TopLevel<'a> {
    duplicate: &'a mut Option<String>,
}

impl<'de> DeserializeSeed<'de> for TopLevel<'_> {
    type Value = Option<BTreeMap<String, Value>>;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        match (Strict { duplicate: self.duplicate }).deserialize(deserializer)? {
            Value::Object(fields) => Ok(Some(fields.into_iter().collect())),
            _ => Ok(None),
        }
    }
}

struct Strict<'a> {
    duplicate: &'a mut Option<String>,
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut read = Vec::new();
        while let Some(item) = items.next_element_seed(Strict { duplicate: &mut *self.duplicate })? {
            read.push(item);
        }
        Ok(Value::Array(read))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut read = serde_json::Map::new();
        while let Some(name) = fields.next_key::<String>()? {
            let value = fields.next_value_seed(Strict { duplicate: &mut *self.duplicate })?;
            if read.contains_key(&name) {
                *self.duplicate = Some(name);
                return Err(A::Error::custom("duplicate field"));
            }
            read.insert(name, value);
        }
        Ok(Value::Object(read))
    }
}
