//! What figment says of settings that cannot be read, without their values: one in the wrong place may be a URL with its
//! password.

use super::ConfigError;
use figment::Error;
use figment::error::{Actual, Kind};

/// The names, the files and the variables stay.
pub(super) fn of(error: Error) -> ConfigError {
    let mut errors: Vec<Error> = error.into_iter().map(without_value).collect();
    // The first is the last that was found.
    let oldest = errors.pop().unwrap_or_else(|| Error::from("the settings cannot be read"));
    ConfigError::Unreadable(Box::new(errors.into_iter().rev().fold(oldest, Error::chain)))
}

fn without_value(mut error: Error) -> Error {
    error.kind = match error.kind {
        Kind::InvalidType(actual, expected) => Kind::InvalidType(sort(&actual), expected),
        Kind::InvalidValue(actual, expected) => Kind::InvalidValue(sort(&actual), expected),
        Kind::Unsupported(actual) => Kind::Unsupported(sort(&actual)),
        Kind::UnsupportedKey(actual, expected) => Kind::UnsupportedKey(sort(&actual), expected),
        Kind::UnknownVariant(_, known) => Kind::UnknownVariant("another word".into(), known),
        Kind::ISizeOutOfRange(_) | Kind::USizeOutOfRange(_) => Kind::Message("a number that is out of range".into()),
        // These name settings, or are our own words.
        kind @ (Kind::Message(_)
        | Kind::InvalidLength(..)
        | Kind::UnknownField(..)
        | Kind::MissingField(_)
        | Kind::DuplicateField(_)) => kind,
    };
    error
}

/// Of which sort a value is.
fn sort(actual: &Actual) -> Actual {
    let sort = match actual {
        Actual::Bool(_) => "a boolean",
        Actual::Unsigned(_) | Actual::Signed(_) => "a whole number",
        Actual::Float(_) => "a number",
        Actual::Char(_) | Actual::Str(_) | Actual::Bytes(_) => "a string",
        Actual::Unit | Actual::Option => "nothing",
        Actual::Seq => "a list",
        Actual::Map | Actual::NewtypeStruct => "a section",
        Actual::Enum | Actual::UnitVariant | Actual::NewtypeVariant | Actual::TupleVariant | Actual::StructVariant => {
            "a word"
        }
        Actual::Other(_) => "something else",
    };
    Actual::Other(sort.into())
}

#[cfg(test)]
mod tests {
    use super::super::Loaded;

    fn told(text: &str) -> String {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("k.toml");
        std::fs::write(&file, text).unwrap();
        let error = Loaded::read(Some(&file)).unwrap_err();
        assert!(!format!("{error:?}").contains("s3cret"), "{error:?}");
        error.to_string()
    }

    #[test]
    fn a_value_in_the_wrong_place_is_not_told() {
        for (text, setting, found) in [
            (r#"database = "postgres://u:s3cret@h/d""#, "default.database", "found a string, expected"),
            (r#"requests_from = "s3cret""#, "default.requests_from", "found a string, expected a sequence"),
            (r#"requests_from = ["s3cret"]"#, "default.requests_from", ""),
            (r#"log.format = "s3cret""#, "default.log.format", "found `another word`, expected"),
            (r#"rabbitmq.prefetch = "s3cret""#, "default.rabbitmq.prefetch", "found a string, expected u16"),
            (r#"admin.listen = "s3cret""#, "default.admin.listen", ""),
            (
                r#"rabbitmq.identity_proof = "s3cret""#,
                "default.rabbitmq",
                "identity_proof: expected broker or signature",
            ),
            (r#"targets = "s3cret""#, "default.targets", "found a string, expected"),
        ] {
            let told = told(text);
            assert!(!told.contains("s3cret"), "{told}");
            assert!(told.contains(setting) && told.contains(found) && told.contains("k.toml"), "{told}");
        }
    }

    #[test]
    #[expect(clippy::result_large_err, reason = "figment's jail wants figment's error")]
    fn nor_is_one_of_the_environment() {
        figment::Jail::expect_with(|jail| {
            jail.set_env("KEYFERRY_TARGETS", "s3cret");
            let error = Loaded::read(None).unwrap_err().to_string();
            assert!(!error.contains("s3cret"), "{error}");
            assert!(error.contains("KEYFERRY_TARGETS") || error.contains("TARGETS"), "{error}");
            Ok(())
        });
    }
}
