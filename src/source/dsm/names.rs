//! Which object last had a name. Never believed: only a guess of what the server is going to say.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Names remembered at most; a few hundred bytes each.
const MOST: usize = 1024;

/// Unique identifiers by name.
#[derive(Debug, Default)]
pub(super) struct Names(Mutex<HashMap<String, String>>);

impl Names {
    /// The unique identifier of whatever had that name.
    pub(super) fn get(&self, name: &str) -> Option<String> {
        self.with(|names| names.get(name).cloned())
    }

    /// Remembers; when there is no room, something else is forgotten.
    pub(super) fn remember(&self, name: &str, id: &str) {
        self.with(|names| {
            if names.len() >= MOST
                && let Some(other) = names.keys().next().cloned()
            {
                names.remove(&other);
            }
            names.insert(name.to_owned(), id.to_owned());
        });
    }

    /// Forgets.
    pub(super) fn forget(&self, name: &str) {
        self.with(|names| names.remove(name));
    }

    fn with<T>(&self, act: impl FnOnce(&mut HashMap<String, String>) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_never_grows_beyond_its_bound() {
        let names = Names::default();
        for at in 0..2 * MOST {
            names.remember(&at.to_string(), "id");
        }
        let last = (2 * MOST - 1).to_string();
        assert_eq!(names.with(|names| names.len()), MOST);
        assert_eq!(names.get(&last).as_deref(), Some("id"));
        names.forget(&last);
        assert_eq!(names.get(&last), None);
    }
}
