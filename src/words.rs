//! Closed sets of words: the stable texts of codes, classes and kinds, which label metrics too. And others' words, made harmless.

/// Others' words without what forges lines of a log, moves a terminal's cursor, or turns the direction of what is read: blanks
/// are in its place.
pub fn printable(text: &str) -> impl Iterator<Item = char> {
    let is_meant_for_machines = |c: char| {
        let is_direction = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        c.is_control() || is_direction || matches!(c, '\u{2028}' | '\u{2029}')
    };
    text.chars().map(move |c| if is_meant_for_machines(c) { ' ' } else { c })
}

/// A closed set of words.
pub trait Words: Copy + 'static {
    /// Every one, in the order of the places.
    const ALL: &'static [Self];

    /// The stable text.
    fn as_str(self) -> &'static str;

    /// The place in [`Self::ALL`].
    fn place(self) -> usize;
}

/// An enum whose variants are words. `ALL` cannot miss one: it is made of the same list.
macro_rules! words {
    ($(#[$meta:meta])* $vis:vis $name:ident { $($(#[$doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        $vis enum $name { $($(#[$doc])* $variant,)* }

        impl $name {
            /// Every one.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The stable text.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl $crate::words::Words for $name {
            const ALL: &'static [Self] = Self::ALL;

            fn as_str(self) -> &'static str {
                self.as_str()
            }

            fn place(self) -> usize {
                self as usize
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn others_words_stay_in_their_line_and_give_no_commands() {
        let text: String = printable("a\nb\r\x1b[2Jc\0d\u{9b}e\u{202e}f\u{2028}g äöü 鍵").collect();
        assert_eq!(text, "a b  [2Jc d e f g äöü 鍵");
    }
}
