//! `keyferry completions` and `keyferry man`: what is made from the command line's own description.

use super::output::Output;
use super::{Cli, Failed};
use anyhow::Context as _;
use clap::{Args, CommandFactory as _};
use clap_complete::Shell;
use serde_json::json;
use std::io::Write as _;
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    keyferry completions bash >/etc/bash_completion.d/keyferry\n  \
    keyferry completions zsh >\"${fpath[1]}/_keyferry\"\n  \
    keyferry completions fish >~/.config/fish/completions/keyferry.fish")]
pub(super) struct Completions {
    /// The shell.
    shell: Shell,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    keyferry man | man -l -\n  \
    keyferry man --dir /usr/local/share/man/man1")]
pub(super) struct Man {
    /// Write a page for every command into this directory; pages that are there are replaced. Absent: keyferry's own page
    /// goes to standard output.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl Completions {
    pub(super) fn run(&self) -> Result<(), Failed> {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "keyferry", &mut text);
        write(&text)
    }
}

impl Man {
    pub(super) fn run(&self, output: Output) -> Result<(), Failed> {
        // Subcommands are named in full only once it is built.
        let mut command = Cli::command().disable_help_subcommand(true);
        command.build();
        let Some(dir) = &self.dir else {
            let mut text = Vec::new();
            clap_mangen::Man::new(command).render(&mut text)?;
            return write(&text);
        };
        std::fs::create_dir_all(dir).with_context(|| format!("the directory {} cannot be made", dir.display()))?;
        let mut pages = Vec::new();
        page(&command, dir, &mut pages)?;
        output.value(&json!({"pages": pages}), |_| format!("{} pages in {}", pages.len(), dir.display()));
        Ok(())
    }
}

/// A command's page, and those of its subcommands.
fn page(command: &clap::Command, dir: &Path, pages: &mut Vec<String>) -> Result<(), Failed> {
    let man = clap_mangen::Man::new(command.clone());
    let (path, mut text) = (dir.join(man.get_filename()), Vec::new());
    man.render(&mut text)?;
    std::fs::write(&path, text).with_context(|| format!("the page {} cannot be written", path.display()))?;
    pages.push(man.get_filename());
    command.get_subcommands().filter(|command| !command.is_hide_set()).try_for_each(|command| page(command, dir, pages))
}

fn write(text: &[u8]) -> Result<(), Failed> {
    let mut out = std::io::stdout().lock();
    Ok(out.write_all(text).and_then(|()| out.flush())?)
}
