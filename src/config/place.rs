//! Where a setting is written: the environment, or the file.

use super::{Loaded, Settings, open_to_others};
use secrecy::SecretString;
use std::path::Path;

/// Where a setting is written, or would be: its variable goes before the file.
pub fn place(file: &Path, name: &str) -> String {
    // A list such as `targets` is one variable.
    let whole = name.split('.').next().unwrap_or_default();
    let variables = [variable(name), variable(whole)];
    let set = variables.into_iter().find(|variable| std::env::var_os(variable).is_some());
    set.unwrap_or_else(|| file.display().to_string())
}

/// The environment variable that sets a setting.
pub(super) fn variable(name: &str) -> String {
    format!("KEYFERRY_{}", name.to_uppercase().replace('.', "__"))
}

impl Loaded {
    /// What is wrong with who may read the settings file, if it holds a secret itself.
    pub fn settings_file_warning(&self) -> Option<String> {
        let Settings { database, rabbitmq, keys, targets, .. } = &self.settings;
        let secrets = [
            ("database.url", &database.url),
            ("database.owner_url", &database.owner_url),
            ("rabbitmq.url", &rabbitmq.url),
            ("rabbitmq.api_url", &rabbitmq.api_url),
            ("keys.kek", &keys.kek),
        ];
        let external_ids = targets.iter().map(|target| ("targets.external_id", &target.external_id));
        let is_inside = |(name, value): &(&str, &Option<SecretString>)| {
            // All targets are one variable.
            let whole = name.split('.').next().unwrap_or_default();
            value.is_some() && ![*name, whole].iter().any(|name| std::env::var_os(variable(name)).is_some())
        };
        let (name, _) = secrets.into_iter().chain(external_ids).find(|secret| is_inside(secret))?;
        open_to_others(&self.file).map(|mode| {
            format!(
                "the settings file {} is open to more than its owner (mode {mode:o}) and may hold a secret, such as {name}; \
                 chmod 600 unless something else keeps others away",
                self.file.display()
            )
        })
    }
}
