//! Closed sets of words: the stable texts of codes, classes and kinds, which label metrics too.

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
