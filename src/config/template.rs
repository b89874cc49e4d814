//! A settings file to begin with: every setting, its comment, its default.
//!
//! Comments are those of the structs, read from this room's own sources, and defaults are the structs' own: what is
//! written about a setting is written once.

use super::Settings;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Where the structs are written.
const SOURCES: [&str; 7] = [
    include_str!("../config.rs"),
    include_str!("dsm.rs"),
    include_str!("identity.rs"),
    include_str!("intake.rs"),
    include_str!("quota.rs"),
    include_str!("sqs.rs"),
    include_str!("target.rs"),
];

/// The name of a connection in the example of a table `[dsm.NAME]`.
const NAME: &str = "prod";

/// Settings that have no default, with a value as it could be. In TOML.
const EXAMPLES: &[(&str, &str)] = &[
    ("dsm_default", "\"prod\""),
    ("database.owner_url", "\"postgres://keyferry_owner:PASSWORD@localhost:5432/keyferry?sslmode=require\""),
    ("database.ca_file", "\"/etc/keyferry/postgres-ca.pem\""),
    ("rabbitmq.password_file", "\"/etc/keyferry/rabbitmq-password\""),
    ("rabbitmq.ca_file", "\"/etc/keyferry/rabbitmq-ca.pem\""),
    ("rabbitmq.cert_file", "\"/etc/keyferry/rabbitmq.crt\""),
    ("rabbitmq.key_file", "\"/etc/keyferry/rabbitmq.key\""),
    ("rabbitmq.server_name", "\"mq.example.com\""),
    ("rabbitmq.api_url", "\"http://USER:PASSWORD@localhost:15672\""),
    ("rabbitmq.identity", "\"required\""),
    ("rabbitmq.identity_proof", "\"broker\""),
    ("rabbitmq.audience", "\"prod/keyferry.jobs\""),
    ("sqs.region", "\"eu-central-1\""),
    ("sqs.requests_queue_url", "\"https://sqs.eu-central-1.amazonaws.com/111122223333/keyferry-jobs\""),
    ("sqs.dead_letter_queue_url", "\"https://sqs.eu-central-1.amazonaws.com/111122223333/keyferry-dead\""),
    ("sqs.events_queue_url", "\"https://sqs.eu-central-1.amazonaws.com/111122223333/keyferry-events\""),
    ("sqs.identity", "\"required\""),
    ("sqs.identity_proof", "\"broker\""),
    ("sqs.audience", "\"prod/keyferry-jobs\""),
    ("keys.kek", "\"BASE64\""),
    ("dsm.servers", "[\"kms.example.com:5696\"]"),
    ("dsm.ca_file", "\"/etc/keyferry/dsm-ca.pem\""),
    ("dsm.cert_file", "\"/etc/keyferry/dsm.crt\""),
    ("dsm.key_file", "\"/etc/keyferry/dsm.key\""),
    ("dsm.server_name", "\"kms.example.com\""),
    ("dsm.protocol", "\"auto\""),
    ("dsm.max_connections", "4"),
    ("dsm.connect_timeout_ms", "5000"),
    ("dsm.request_timeout_ms", "5000"),
    ("targets.partition", "\"aws\""),
    ("targets.role_arn", "\"arn:aws:iam::111122223333:role/keyferry\""),
    ("targets.external_id", "\"EXTERNAL-ID\""),
    ("targets.external_id_file", "\"/etc/keyferry/external-id\""),
    ("targets.session_name", "\"keyferry\""),
    ("targets.session_s", "3600"),
    ("targets.sts_region", "\"eu-central-1\""),
    ("targets.fips", "false"),
    ("targets.dual_stack", "false"),
    ("targets.endpoints", "{ eu-central-1 = \"https://vpce-0a1b.kms.eu-central-1.vpce.amazonaws.com\" }"),
];

/// Settings that nobody can know but the reader, by the place that is to be filled in, with what is not filled in yet.
const PLACES: [(&str, &str); 4] =
    [("database.url", "\"\""), ("rabbitmq.url", "\"\""), ("targets.account", "\"\""), ("targets.regions", "[]")];

/// What a template says of this installation.
#[derive(Clone, Copy, Debug)]
pub struct Filled<'a> {
    /// The file of the policy, as the setting names it.
    pub policy: &'a str,
    /// The file of the key-encryption key. `None`: to be filled in like other places.
    pub kek_file: Option<&'a Path>,
}

/// A settings file, and where it is to be filled in: a setting and its line, from one.
pub fn template(filled: Filled<'_>) -> (String, Vec<(String, usize)>) {
    let shapes = shapes();
    let defaults = serde_json::to_value(Settings::default()).unwrap_or_default();
    let mut page = Page { text: HEAD.to_owned(), filled, places: Vec::new() };
    let (sections, scalars): (Vec<&Field>, Vec<&Field>) =
        fields("Settings", &shapes).into_iter().partition(|field| shapes.contains_key(field.inner()));
    for field in scalars {
        page.setting("", field, &defaults[&field.name]);
    }
    for section in sections {
        page.section(section);
        for field in fields(section.inner(), &shapes) {
            page.setting(&section.name, field, &defaults[&section.name][&field.name]);
        }
    }
    (page.text, page.places)
}

const HEAD: &str = "\
# The settings of Keyferry: all of them. What begins with # is not set, and shows the default, or an example where there
# is none. Each can be set by the environment as well: KEYFERRY_SECTION__NAME, as in KEYFERRY_DATABASE__URL.
#
# FILL IN marks what only you know. Then: keyferry config check
";

/// A setting, as its struct has it.
#[derive(Clone, Debug)]
struct Field {
    name: String,
    comment: Vec<String>,
    kind: String,
    /// Its own fields stand in its place.
    is_flat: bool,
}

impl Field {
    /// The type that a list, a table of tables or an option is of.
    fn inner(&self) -> &str {
        let kind = self.kind.strip_prefix("BTreeMap<String, ").unwrap_or(&self.kind);
        let kind = kind.strip_prefix("Vec<").or_else(|| kind.strip_prefix("Option<")).unwrap_or(kind);
        kind.trim_end_matches('>')
    }
}

/// Structs by their names.
type Shapes = BTreeMap<String, Vec<Field>>;

/// The fields of a struct, those of its flattened parts included.
fn fields<'a>(name: &str, shapes: &'a Shapes) -> Vec<&'a Field> {
    let own = shapes.get(name).into_iter().flatten();
    own.flat_map(|field| if field.is_flat { fields(field.inner(), shapes) } else { vec![field] }).collect()
}

/// Reads the structs of this room. rustfmt has written each field, attribute and comment on a line of its own.
fn shapes() -> Shapes {
    let mut shapes = Shapes::new();
    for source in SOURCES {
        let (mut open, mut comment, mut is_flat) = (None, Vec::new(), false);
        let code = source.split("#[cfg(test)]").next().unwrap_or_default();
        for line in code.lines().map(str::trim) {
            if let Some(words) = line.strip_prefix("///") {
                comment.push(words.trim().replace('`', ""));
            } else if line.starts_with("#[") {
                is_flat |= line.contains("(flatten)");
            } else if let Some(name) = line.strip_prefix("pub struct ").and_then(|rest| rest.strip_suffix(" {")) {
                open = Some(name.to_owned());
                comment.clear();
            } else if line == "}" {
                open = None;
            } else {
                let field = line.strip_prefix("pub ").and_then(|rest| rest.strip_suffix(',')?.split_once(": "));
                if let (Some(name), Some((field, kind))) = (&open, field) {
                    let (name, kind) = (name.clone(), kind.to_owned());
                    let comment = std::mem::take(&mut comment);
                    shapes.entry(name).or_default().push(Field { name: field.to_owned(), comment, kind, is_flat });
                }
                comment.clear();
                is_flat = false;
            }
        }
    }
    shapes
}

/// The file as it is written.
struct Page<'a> {
    text: String,
    filled: Filled<'a>,
    places: Vec<(String, usize)>,
}

impl Page<'_> {
    fn section(&mut self, section: &Field) {
        self.text.push('\n');
        self.comment(section);
        let name = &section.name;
        // Nobody has a KMIP server unless the reader has.
        let line = match section.kind.as_str() {
            kind if kind.starts_with("BTreeMap<") => format!("#[{name}.{NAME}]"),
            kind if kind.starts_with("Vec<") => format!("[[{name}]]"),
            _ => format!("[{name}]"),
        };
        self.line(&line);
    }

    fn setting(&mut self, section: &str, field: &Field, default: &Value) {
        let name = &field.name;
        let dotted = if section.is_empty() { name.clone() } else { format!("{section}.{name}") };
        self.text.push('\n');
        self.comment(field);
        let given = match dotted.as_str() {
            "policy" => Some(toml_text(self.filled.policy)),
            "keys.kek_file" => self.filled.kek_file.map(|path| toml_text(&path.to_string_lossy())),
            _ => None,
        };
        let place = PLACES.iter().chain(&[("keys.kek_file", "\"\"")]).find(|(place, _)| *place == dotted);
        match (given, place) {
            (Some(value), _) => self.line(&format!("{name} = {value}")),
            (None, Some((_, value))) => {
                self.line("# FILL IN");
                self.line(&format!("{name} = {value}"));
                self.places.push((dotted, self.text.lines().count()));
            }
            (None, None) => {
                let example = EXAMPLES.iter().find(|(known, _)| *known == dotted).map(|(_, value)| (*value).to_owned());
                let value = match default {
                    Value::Null => example.unwrap_or_else(|| toml_text("")),
                    default => toml_value(default),
                };
                self.line(&format!("#{name} = {value}"));
            }
        }
    }

    fn comment(&mut self, field: &Field) {
        for words in &field.comment {
            self.line(&format!("# {words}"));
        }
    }

    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }
}

/// Lists, texts, numbers and truths are written as JSON writes them; a table is written in one line.
fn toml_value(value: &Value) -> String {
    match value {
        Value::Object(fields) => {
            let fields: Vec<String> =
                fields.iter().map(|(name, value)| format!("{name} = {}", toml_value(value))).collect();
            format!("{{ {} }}", fields.join(", "))
        }
        value => value.to_string(),
    }
}

/// A basic string of TOML, whose escapes are JSON's.
fn toml_text(text: &str) -> String {
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DsmConnection, Target};

    fn whole() -> String {
        let path = Path::new("/etc/\"key\\ferry\"/kek");
        template(Filled { policy: "policy.toml", kek_file: Some(path) }).0
    }

    /// As somebody would who sets everything.
    fn uncommented(text: &str) -> String {
        let line = |line: &str| match line.strip_prefix('#') {
            Some(rest) if !rest.starts_with(' ') && !rest.is_empty() => format!("{rest}\n"),
            _ => format!("{line}\n"),
        };
        text.lines().map(line).collect()
    }

    #[test]
    fn every_setting_is_there_with_a_comment_and_its_default() {
        let text = whole();
        let set: toml::Table = toml::from_str(&uncommented(&text)).unwrap();
        let mut settings = serde_json::to_value(Settings::default()).unwrap();
        // Their structs have no default.
        let of = |text: &str| toml::from_str::<toml::Value>(text).unwrap();
        let target: Target = of("account = \"1\"\nregions = []").try_into().unwrap();
        let dsm: DsmConnection =
            of("servers = []\nca_file = \"\"\ncert_file = \"\"\nkey_file = \"\"").try_into().unwrap();
        settings["targets"] = serde_json::to_value(target).unwrap();
        settings["dsm"] = serde_json::to_value(dsm).unwrap();
        let mut seen = 0;
        for (name, value) in settings.as_object().unwrap() {
            let Value::Object(fields) = value else {
                assert!(set.contains_key(name), "{name} is not in the template");
                seen += 1;
                continue;
            };
            let section = match name.as_str() {
                "dsm" => &set[name][NAME],
                "targets" => &set[name][0],
                _ => &set[name],
            };
            for (field, default) in fields {
                let written = section.get(field).unwrap_or_else(|| panic!("{name}.{field} is not in the template"));
                if (name == "dsm" && (default.is_number() || field == "protocol")) || field == "partition" {
                    assert_eq!(serde_json::to_value(written).unwrap(), *default, "{name}.{field}");
                }
                let line =
                    text.lines().position(|line| line.trim_start_matches('#').starts_with(&format!("{field} = ")));
                assert!(text.lines().nth(line.unwrap() - 1).unwrap().starts_with("# "), "{field} has no comment");
                seen += 1;
            }
        }
        assert!(seen > 55, "{seen}");
    }

    #[test]
    fn it_is_read_as_it_is_and_with_everything_set() {
        let text = whole();
        let settings: Settings = toml::from_str(&text).unwrap();
        assert_eq!(settings.keys.kek_file.as_deref(), Some(Path::new("/etc/\"key\\ferry\"/kek")));
        // What is not set is what would hold anyway.
        let mut shown = serde_json::to_value(&settings).unwrap();
        for (section, name) in [("database", "url"), ("rabbitmq", "url"), ("keys", "kek_file")] {
            shown[section][name] = Value::Null;
        }
        shown["policy"] = Value::Null;
        shown["targets"] = serde_json::json!([]);
        assert_eq!(shown, serde_json::to_value(Settings::default()).unwrap());
        let all: Settings = toml::from_str(&uncommented(&text)).unwrap();
        assert_eq!(all.dsm[NAME].servers, ["kms.example.com:5696"]);
        let none: Vec<&str> = EXAMPLES.iter().filter(|(_, value)| *value == "\"\"").map(|(name, _)| *name).collect();
        assert_eq!(none, [""; 0]);
    }

    #[test]
    fn places_are_told_by_their_lines() {
        let (text, places) = template(Filled { policy: "p", kek_file: None });
        let names: Vec<&str> = places.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["database.url", "rabbitmq.url", "keys.kek_file", "targets.account", "targets.regions"]);
        for (name, line) in &places {
            let written = text.lines().nth(line - 1).unwrap();
            assert!(written.starts_with(&format!("{} = ", name.rsplit('.').next().unwrap())), "{name}: {written}");
        }
        assert_eq!(text.matches("FILL IN\n").count(), 5);
    }
}
