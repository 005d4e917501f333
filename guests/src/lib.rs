//! Bare-metal guests, assembled by the Rust compiler itself.
//!
//! The examples of `bantam example` and the guests of the whole-machine tests. Each is one block of `global_asm!` in a
//! read-only section, handed out as the bytes of a file: nothing here ever runs on the host. Invariant: no image holds
//! a relocation. Addresses in it are differences of its own labels plus the address it is loaded at.
//!
//! A guest has the same name on both architectures where it does the same.

/// Assembles `$code` into a read-only section and makes a function `$name` that returns the bytes.
macro_rules! guest {
    ($(#[$doc:meta])* $name:ident, $($code:expr),+ $(,)?) => {
        core::arch::global_asm!(
            concat!(".pushsection .rodata.guest_", stringify!($name), ", \"a\""),
            concat!(".globl guest_", stringify!($name), ", guest_", stringify!($name), "_end"),
            concat!(".hidden guest_", stringify!($name), ", guest_", stringify!($name), "_end"),
            concat!("guest_", stringify!($name), ":"),
            $($code,)+
            concat!("guest_", stringify!($name), "_end:"),
            ".popsection",
            // All the assembly of a compilation unit is one text: leave it as it was found.
            assembler_state!(),
            options(raw),
        );
        $(#[$doc])*
        pub fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("guest_", stringify!($name))]
                static START: u8;
                #[link_name = concat!("guest_", stringify!($name), "_end")]
                static END: u8;
            }
            let (start, end) = (&raw const START, &raw const END);
            // SAFETY: the assembler put both labels into one read-only section, END at or after START, and every byte
            // between them is initialised.
            unsafe { core::slice::from_raw_parts(start, end.addr() - start.addr()) }
        }
    };
}

/// A list of guests: name, function, words, description, outcome.
macro_rules! list {
    ($(#[$doc:meta])* $list:ident: $($name:literal $image:ident $words:expr, $about:literal, $expect:literal;)+) => {
        $(#[$doc])*
        pub(crate) const $list: &[$crate::Guest] = &[$($crate::Guest {
            name: $name, about: $about, words: &$words, image: $image, expect: $expect,
        },)+];
    };
}

#[cfg(target_arch = "aarch64")]
#[path = "aarch64/mod.rs"]
mod arch;
#[cfg(target_arch = "x86_64")]
#[path = "x86_64/mod.rs"]
mod arch;

pub use arch::*;

/// A built-in guest.
#[derive(Debug, Clone, Copy)]
pub struct Guest {
    /// What `bantam example` calls it.
    pub name: &'static str,
    /// What it shows, in one line.
    pub about: &'static str,
    /// The options of `bantam run` that it wants.
    pub words: &'static [&'static str],
    /// The bytes of its file.
    pub image: fn() -> &'static [u8],
    /// What it prints, and how it ends.
    pub expect: &'static str,
}

/// The guests that `bantam example` shows, the simplest first.
pub fn all() -> &'static [Guest] {
    arch::EXAMPLES
}

/// The guests that only tests and benchmarks use.
pub fn tests() -> &'static [Guest] {
    arch::TESTS
}

/// The guest of that name: an example, or else a test's.
pub fn find(name: &str) -> Option<&'static Guest> {
    all().iter().chain(tests()).find(|guest| guest.name == name)
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn names_are_unique_and_find_their_guest() {
        let mut names = std::collections::BTreeSet::new();
        for guest in all().iter().chain(tests()) {
            assert!(names.insert(guest.name), "{} is there twice", guest.name);
            assert_eq!(find(guest.name).unwrap().about, guest.about);
            assert!(guest.name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-')), "{}", guest.name);
        }
        assert!(find("no such guest").is_none());
    }

    #[test]
    fn every_guest_has_an_image_and_says_what_it_does() {
        for guest in all().iter().chain(tests()) {
            let size = (guest.image)().len();
            assert!((2..=4096).contains(&size), "{}: {size} bytes", guest.name);
            assert!(!guest.about.contains('\n') && guest.about.len() > 10, "{}", guest.name);
            assert!(guest.about.len() <= 90, "{}: about is for a list of one-line entries", guest.name);
            assert!(!guest.expect.is_empty(), "{}", guest.name);
            assert!(guest.words.is_empty() || guest.words[0].starts_with("--"), "{}", guest.name);
        }
    }
}
