//! Names for addresses of a guest, from the symbol table of an ELF.
//!
//! Invariant: names are printable ASCII, since they come from a file and go to a terminal.

use std::sync::Arc;

/// Function and label names, sorted by address. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Symbols(Arc<[(u64, u64, Box<str>)]>);

/// A symbol without a size covers what follows it, up to this far.
const REACH: u64 = 64 << 10;

impl Symbols {
    /// From addresses, sizes and names.
    pub fn new(mut all: Vec<(u64, u64, String)>) -> Self {
        // Of several at one address the one that says how long it is.
        all.sort_by_key(|(address, size, _)| (*address, std::cmp::Reverse(*size)));
        all.dedup_by_key(|(address, ..)| *address);
        let printable = |name: String| name.chars().filter(char::is_ascii_graphic).take(200).collect::<String>();
        Self(all.into_iter().map(|(address, size, name)| (address, size, printable(name).into())).collect())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The symbol that an address lies in, and how far in.
    pub fn at(&self, address: u64) -> Option<(&str, u64)> {
        let below = self.0.partition_point(|(start, ..)| *start <= address).checked_sub(1)?;
        let (start, size, name) = self.0.get(below)?;
        let offset = address - start;
        (offset < if *size == 0 { REACH } else { *size }).then_some((name, offset))
    }

    /// ` <name+0x12>`, or nothing.
    pub fn suffix(&self, address: u64) -> String {
        match self.at(address) {
            Some((name, 0)) => format!(" <{name}>"),
            Some((name, offset)) => format!(" <{name}+{offset:#x}>"),
            None => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_named_by_the_symbol_it_lies_in() {
        let all = [(0x2000, 0, "alias"), (0x1000, 0, "_start"), (0x2000, 0x10, "main\u{1b}[31m")];
        let symbols = Symbols::new(all.map(|(a, s, n)| (a, s, n.to_owned())).to_vec());
        assert_eq!(symbols.suffix(0x1000), " <_start>");
        assert_eq!(symbols.suffix(0x1fff), " <_start+0xfff>");
        assert_eq!(symbols.suffix(0x2004), " <main[31m+0x4>");
        assert_eq!((symbols.suffix(0xfff), symbols.suffix(0x2010)), (String::new(), String::new()));
        assert_eq!(symbols.len(), 2);
    }
}
