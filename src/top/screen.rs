//! The terminal as ratatui draws on it: with sequences that every terminal has, ECMA-48's and xterm's for the second screen.
//!
//! Its own crossterm backend would do, and would bring 25 packages for what is here. Invariant: the terminal is asked
//! nothing, since an answer would come among the keys.

use std::fmt::Write;
use std::io;

use ratatui_core::backend::{Backend, ClearType, WindowSize};
use ratatui_core::buffer::Cell;
use ratatui_core::layout::{Position, Size};
use ratatui_core::style::Modifier;

use crate::host::say;
use crate::host::terminal;

/// Switches to the screen behind the shell's, where there is one, empties it and hides the cursor; and back.
pub const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[2J";
pub const LEAVE: &str = "\x1b[0m\x1b[?25h\x1b[?1049l";
const CLEAR: &str = "\x1b[2J";
/// Of a terminal that does not say how large it is.
const USUAL: [u16; 2] = [80, 24];

/// What is drawn and not yet sent, and where the next character would go.
#[derive(Debug, Default)]
pub struct Screen {
    text: String,
    next: Option<Position>,
    style: Modifier,
}

impl Screen {
    fn put(&mut self, at: Position, cell: &Cell) -> std::fmt::Result {
        if self.next != Some(at) {
            write!(self.text, "\x1b[{};{}H", u32::from(at.y) + 1, u32::from(at.x) + 1)?;
        }
        if self.style != cell.modifier {
            self.text += "\x1b[0";
            for (modifier, code) in [(Modifier::BOLD, ";1"), (Modifier::DIM, ";2"), (Modifier::REVERSED, ";7")] {
                self.text += if cell.modifier.contains(modifier) { code } else { "" };
            }
            self.text += "m";
            self.style = cell.modifier;
        }
        self.text += cell.symbol();
        // How wide other characters are terminals do not agree on.
        let narrow = cell.symbol().len() == 1;
        self.next = narrow.then_some(Position { x: at.x.saturating_add(1), y: at.y });
        Ok(())
    }
}

impl Backend for Screen {
    type Error = io::Error;

    fn draw<'a, I: Iterator<Item = (u16, u16, &'a Cell)>>(&mut self, mut content: I) -> io::Result<()> {
        content.try_for_each(|(x, y, cell)| self.put(Position { x, y }, cell)).map_err(io::Error::other)
    }

    fn hide_cursor(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn show_cursor(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn get_cursor_position(&mut self) -> io::Result<Position> {
        Ok(self.next.unwrap_or_default())
    }

    fn set_cursor_position<P: Into<Position>>(&mut self, _position: P) -> io::Result<()> {
        self.next = None;
        Ok(())
    }

    fn clear(&mut self) -> io::Result<()> {
        (self.next, self.style) = (None, Modifier::empty());
        self.text += "\x1b[0m";
        self.text += CLEAR;
        Ok(())
    }

    fn clear_region(&mut self, _region: ClearType) -> io::Result<()> {
        self.clear()
    }

    fn size(&self) -> io::Result<Size> {
        let [width, height] = terminal::size().filter(|size| !size.contains(&0)).unwrap_or(USUAL);
        Ok(Size { width, height })
    }

    fn window_size(&mut self) -> io::Result<WindowSize> {
        Ok(WindowSize { columns_rows: self.size()?, pixels: Size::default() })
    }

    fn flush(&mut self) -> io::Result<()> {
        let text = std::mem::take(&mut self.text);
        say::print(text.as_bytes()).map(|_| ()).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changes_is_sent() {
        let mut screen = Screen::default();
        let mut bold = Cell::new("b");
        bold.modifier = Modifier::BOLD;
        let (a, wide) = (Cell::new("a"), Cell::new("語"));
        screen.draw([(0, 0, &a), (1, 0, &bold), (2, 0, &bold), (9, 1, &wide), (11, 1, &a)].into_iter()).unwrap();
        assert_eq!(screen.text, "\x1b[1;1Ha\x1b[0;1mbb\x1b[2;10H\x1b[0m語\x1b[2;12Ha");
        screen.text.clear();
        screen.clear().unwrap();
        screen.draw([(12, 1, &a)].into_iter()).unwrap();
        assert_eq!(screen.text, "\x1b[0m\x1b[2J\x1b[2;13Ha");
    }
}
