//! `keyferry init`: the first settings, a policy to begin with, a key-encryption key.

use super::output::Output;
use super::{Coded, Failed};
use crate::config::{DEFAULT_FILE, Filled, template};
use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use serde_json::json;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// A policy to begin with.
const POLICY: &str = include_str!("policy.toml");
const POLICY_FILE: &str = "policy.toml";
const KEK_FILE: &str = "kek";
const KEK_BYTES: usize = 32;

#[derive(Debug, Args)]
#[command(
    after_help = "It writes keyferry.toml with every setting and its default, policy.toml, and the file kek with a new key that\n\
    seals all source keys. All but the policy are for their owner alone.\n\n\
    Keep a copy of kek where the database's backups are not: without it nothing that it sealed can be opened again.\n\
    All workers on one database have the same; --no-kek where there is one already.\n\n\
    Example:\n  \
    keyferry init --dir /etc/keyferry"
)]
pub(super) struct Init {
    /// Where to write; made if it is not there.
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Replace keyferry.toml and policy.toml if they are there. A key-encryption key is never replaced.
    #[arg(long)]
    force: bool,
    /// Make no key-encryption key; `keys.kek_file` is then one of the places to fill in.
    #[arg(long)]
    no_kek: bool,
}

/// What became of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Written {
    New,
    /// It was there, and stays as it is.
    Kept,
}

impl Init {
    pub(super) fn run(&self, output: Output) -> Result<(), Failed> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .with_context(|| format!("the directory {} cannot be made", self.dir.display()))?;
        // Named in the settings, which are read from anywhere.
        let dir = self.dir.canonicalize().with_context(|| format!("{} cannot be found", self.dir.display()))?;
        let (settings, policy, kek) = (dir.join(DEFAULT_FILE), dir.join(POLICY_FILE), dir.join(KEK_FILE));
        if kek.to_str().is_none() {
            let message = format!("the path {} is no UTF-8, and no settings file can name it", dir.display());
            return Err(Coded { code: "path_not_utf8", message }.into());
        }
        // Nothing is written if not everything can be.
        if !self.force
            && let Some(path) = [&settings, &policy].into_iter().find(|path| path.symlink_metadata().is_ok())
        {
            return Err(exists(path).into());
        }
        let key = if self.no_kek { None } else { Some(write_kek(&kek)?) };
        let (text, places) = template(Filled { policy: POLICY_FILE, kek_file: key.map(|_| kek.as_path()) });
        self.write(&policy, POLICY, 0o644)?;
        self.write(&settings, &text, 0o600)?;
        let mut written = vec![&settings, &policy];
        written.extend((key == Some(Written::New)).then_some(&kek));
        let kept: Vec<&PathBuf> = (key == Some(Written::Kept)).then_some(&kek).into_iter().collect();
        let next = next(&settings);
        let fill_in: Vec<_> = places.iter().map(|(name, line)| json!({"setting": name, "line": line})).collect();
        output.value(&json!({"written": written, "kept": kept, "fill_in": fill_in, "next": next}), |_| {
            let mut lines: Vec<String> = written.iter().map(|path| format!("written  {}", path.display())).collect();
            lines.extend(kept.iter().map(|path| format!("kept     {}", path.display())));
            lines.push(format!("\nFill in, in {}:", settings.display()));
            lines.extend(places.iter().map(|(name, line)| format!("  line {line:>3}  {name}")));
            lines.push(format!("and who may ask for what, in {}.\n\nThen:", policy.display()));
            lines.extend(next.iter().map(|(command, what)| format!("  {command:<34}  {what}")));
            lines.join("\n")
        });
        Ok(())
    }

    /// Whole or not at all; over another file only if that was asked for.
    fn write(&self, path: &Path, text: &str, mode: u32) -> Result<(), Failed> {
        let context = || format!("the file {} cannot be written", path.display());
        if !self.force {
            return match create(path, text.as_bytes(), mode) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(exists(path).into()),
                outcome => Ok(outcome.with_context(context)?),
            };
        }
        let mut new = path.as_os_str().to_owned();
        new.push(format!(".{}", std::process::id()));
        create(Path::new(&new), text.as_bytes(), mode).with_context(context)?;
        if let Err(error) = std::fs::rename(&new, path) {
            // The error is what counts.
            drop(std::fs::remove_file(&new));
            return Err(anyhow::Error::new(error).context(context()).into());
        }
        Ok(())
    }
}

/// A new key, unless there is one: everything that is sealed would be lost with it.
fn write_kek(path: &Path) -> Result<Written, Failed> {
    let mut key = Zeroizing::new([0; KEK_BYTES]);
    getrandom::fill(&mut *key)?;
    let text = Zeroizing::new(STANDARD.encode(key.as_slice()));
    match create(path, text.as_bytes(), 0o600) {
        Ok(()) => Ok(Written::New),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(Written::Kept),
        Err(error) => {
            Err(anyhow::Error::new(error).context(format!("the file {} cannot be written", path.display())).into())
        }
    }
}

/// A file of these rights from its first byte on, through no link, and on disk when this returns.
fn create(path: &Path, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    let mut file: File = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if written.is_err() {
        // Half a file helps nobody, and would be taken for a whole one.
        drop(std::fs::remove_file(path));
    }
    written
}

fn exists(path: &Path) -> Coded {
    let message = format!(
        "{} is there already, and nothing was written; --force replaces keyferry.toml and policy.toml, and never a key",
        path.display()
    );
    Coded { code: "file_exists", message }
}

fn next(settings: &Path) -> [(String, &'static str); 5] {
    // Found without being named where it lies in the working directory.
    let is_here = std::env::current_dir().is_ok_and(|here| Some(here.as_path()) == settings.parent());
    let config = if is_here { String::new() } else { format!("--config {} ", settings.display()) };
    [
        ("config check", "whether the settings are complete"),
        ("migrate", "bring the database up to date, as its owner"),
        ("topology apply", "make queues and exchanges"),
        ("doctor", "whether everything is there, and what to type if not"),
        ("serve", "run the worker"),
    ]
    .map(|(command, what)| (format!("keyferry {config}{command}"), what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Policy;

    #[test]
    fn the_policy_to_begin_with_is_good_with_and_without_its_examples() {
        let policy = Policy::parse(POLICY).unwrap();
        assert_eq!(policy.warnings(), [""; 0]);
        let line = |line: &str| match line.strip_prefix('#') {
            Some(rest) if !rest.starts_with(' ') => format!("{rest}\n"),
            _ => format!("{line}\n"),
        };
        assert!(Policy::parse(&POLICY.lines().map(line).collect::<String>()).is_ok());
    }
}
