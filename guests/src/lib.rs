//! Bare-metal guests, assembled by the Rust compiler itself.
//!
//! The examples of `bantam example` and the guests of the whole-machine tests. Each is one block of `global_asm!` in a
//! read-only section, handed out as the bytes of a file: nothing here ever runs on the host. Invariant: no image holds
//! a relocation. Addresses in it are differences of its own labels plus the address it is loaded at.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

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
    #[cfg(target_arch = "x86_64")]
    return x86_64::EXAMPLES;
    #[cfg(not(target_arch = "x86_64"))]
    &[]
}

/// The guests that only tests and benchmarks use.
pub fn tests() -> &'static [Guest] {
    #[cfg(target_arch = "x86_64")]
    return x86_64::TESTS;
    #[cfg(not(target_arch = "x86_64"))]
    &[]
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
        for guest in all().iter().chain(tests()) {
            assert!(std::ptr::eq(find(guest.name).unwrap(), guest), "{} is there twice", guest.name);
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
