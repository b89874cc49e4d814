//! Patterns of the policy file: `*` stands for any run of characters, `?` for any one, everything else for itself.

use std::fmt;

/// Longest pattern in characters: comparing two costs their product.
const LONGEST: usize = 512;

/// A pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob {
    text: String,
    parts: Vec<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// This character.
    Is(char),
    /// Any one.
    One,
    /// Any run, also none.
    Any,
    /// Any run without a colon: a part of an ARN. Not to be written.
    Within,
}

impl Glob {
    /// Reads a pattern. The error says what was expected.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let is_printable = text.chars().all(|c| c == ' ' || c.is_ascii_graphic());
        if text.is_empty() || text.len() > LONGEST || !is_printable || text.trim() != text {
            return Err(
                "expected a pattern of 1 to 512 printable ASCII characters; * stands for any run of them, ? for one",
            );
        }
        let read = text.chars().map(|c| match c {
            '*' => Part::Any,
            '?' => Part::One,
            c => Part::Is(c),
        });
        Ok(Self { text: text.to_owned(), parts: normal(read.collect()) })
    }

    /// A pattern that matches this text and no other.
    pub fn literal(text: &str) -> Self {
        Self { text: text.to_owned(), parts: text.chars().map(Part::Is).collect() }
    }

    /// The ARNs of keys of an account, or of any, in Regions that a pattern matches.
    pub(super) fn arns(account: Option<&str>, region: &Self) -> Self {
        let literal = |text: &str| Self::literal(text).parts;
        let region = region.parts.iter().map(|part| if *part == Part::Any { Part::Within } else { *part });
        let parts = [
            literal("arn:"),
            vec![Part::Within],
            literal(":kms:"),
            region.collect(),
            literal(":"),
            account.map_or_else(|| vec![Part::Within], literal),
            literal(":key/"),
            vec![Part::Within],
        ];
        Self { text: String::new(), parts: parts.concat() }
    }

    /// Whether it matches a text as a whole.
    pub fn matches(&self, text: &str) -> bool {
        self.meets(&Self::literal(text))
    }

    /// Whether it matches everything.
    pub fn is_everything(&self) -> bool {
        self.parts == [Part::Any]
    }

    /// Whether it has no wildcard.
    pub fn is_literal(&self) -> bool {
        self.parts.iter().all(|part| matches!(part, Part::Is(_)))
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether every text that `other` matches is known to be matched by this one: a run of this one takes any parts of
    /// the other, anything else one that is no wider.
    pub fn covers(&self, other: &Self) -> bool {
        walk(&self.parts, &other.parts, |mine, other, rest| match (mine, other) {
            (Some(Part::Any), other) => rest.mine || (other.is_some() && rest.other),
            (Some(Part::One), Some(Part::Is(_) | Part::One)) => rest.both,
            (Some(Part::Is(mine)), Some(Part::Is(other))) => mine == other && rest.both,
            _ => false,
        })
    }

    /// Whether some text is matched by both.
    pub fn meets(&self, other: &Self) -> bool {
        walk(&self.parts, &other.parts, |mine, other, rest| match (mine, other) {
            (Some(Part::Any), other) => rest.mine || (other.is_some() && rest.other),
            (mine, Some(Part::Any)) => rest.other || (mine.is_some() && rest.mine),
            (Some(Part::Within), other) => rest.mine || (is_within(other) && rest.other),
            (mine, Some(Part::Within)) => rest.other || (is_within(mine) && rest.mine),
            (Some(Part::Is(mine)), Some(Part::Is(other))) => mine == other && rest.both,
            (Some(_), Some(_)) => rest.both,
            _ => false,
        })
    }
}

fn is_within(part: Option<&Part>) -> bool {
    part.is_some_and(|part| *part != Part::Is(':'))
}

/// What holds when the first part of one, of the other, or of both is left out.
struct Rest {
    mine: bool,
    other: bool,
    both: bool,
}

/// Compares two patterns from their ends, each pair of rests once. Two empty ones agree.
fn walk(mine: &[Part], others: &[Part], agree: impl Fn(Option<&Part>, Option<&Part>, &Rest) -> bool) -> bool {
    let mut below = vec![false; others.len() + 2];
    for at in (0..=mine.len()).rev() {
        let mut row = vec![false; others.len() + 2];
        for to in (0..=others.len()).rev() {
            let rest = Rest { mine: below[to], other: row[to + 1], both: below[to + 1] };
            row[to] = match (mine.get(at), others.get(to)) {
                (None, None) => true,
                (mine, other) => agree(mine, other, &rest),
            };
        }
        below = row;
    }
    below[0]
}

/// In each run of wildcards the single ones come first and the any is said once: equal patterns look equal.
fn normal(parts: Vec<Part>) -> Vec<Part> {
    let mut normal: Vec<Part> = Vec::with_capacity(parts.len());
    for part in parts {
        match (normal.last(), part) {
            (Some(Part::Any), Part::Any) => {}
            (Some(Part::Any), Part::One) => {
                normal.pop();
                normal.extend([Part::One, Part::Any]);
            }
            _ => normal.push(part),
        }
    }
    normal
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn glob(text: &str) -> Glob {
        Glob::parse(text).unwrap()
    }

    #[test]
    fn a_pattern_matches_the_whole_text() {
        for (pattern, text, matches) in [
            ("*", "", true),
            ("*", "anything", true),
            ("eu-*", "eu-central-1", true),
            ("eu-*", "xeu-central-1", false),
            ("eu-?", "eu-", false),
            ("eu-?", "eu-1", true),
            ("a*b*c", "aXbYc", true),
            ("a*b*c", "aXbY", false),
            ("a**?", "ab", true),
            ("a**?", "a", false),
            ("[a]", "a", false),
        ] {
            assert_eq!(glob(pattern).matches(text), matches, "{pattern} {text}");
        }
        for text in ["", " a", "a\n", "schlüssel", &"x".repeat(513)] {
            assert!(Glob::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn covering_is_found_where_it_is_plain() {
        for (wide, narrow) in [("*", "eu-*"), ("eu-*", "eu-central-?"), ("a*c", "abc"), ("*?", "?*"), ("a?*", "a*?b")] {
            assert!(glob(wide).covers(&glob(narrow)), "{wide} {narrow}");
        }
        for (one, other) in [("eu-*", "*"), ("a?", "a*"), ("a*", "*a"), ("ab", "a?")] {
            assert!(!glob(one).covers(&glob(other)), "{one} {other}");
        }
    }

    proptest! {
        #[test]
        fn what_is_covered_is_matched(a in "[ab?*]{1,6}", b in "[ab?*]{1,6}", text in "[abc]{0,8}") {
            let (a, b) = (glob(&a), glob(&b));
            if a.covers(&b) && b.matches(&text) {
                prop_assert!(a.matches(&text));
            }
            if a.matches(&text) && b.matches(&text) {
                prop_assert!(a.meets(&b) && b.meets(&a));
            }
            prop_assert!(a.covers(&a));
        }

        #[test]
        fn a_literal_meets_what_matches_it(a in "[ab?*]{1,6}", text in "[ab]{1,6}") {
            let literal = Glob::literal(&text);
            prop_assert_eq!(glob(&a).covers(&literal), glob(&a).matches(&text));
        }
    }
}
