//! The guests of the PC.

mod elf;
mod flat;
mod linux;
mod multiboot;
