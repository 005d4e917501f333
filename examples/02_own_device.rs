//! A device of one's own: a register that doubles what is written to it, asked by a guest that ends with the answer.
//!
//!     cargo run --example 02_own_device
//!
//! A device is a value with registers: it is handed to the bus and never learns where it lies.

#![allow(clippy::print_stdout)]

mod parts;

use bantam::bus::{Builder, Device, Effect, Saved};
use bantam::device::debug_exit::DebugExit;
use bantam::memory::{Memory, Span};
use bantam::trace::Off;
use bantam::vcpu::{Flag, run_loop};
use bantam::vm::Vm;
use parts::{ASK, RAM, SPACE};

#[derive(Default)]
struct Doubler {
    // State
    value: u64,
}

impl Device for Doubler {
    fn name(&self) -> &'static str {
        "doubler"
    }

    fn register(&self, _offset: u64, _write: bool) -> &'static str {
        "VALUE"
    }

    fn read(&mut self, _offset: u64, _width: usize) -> u64 {
        self.value.wrapping_mul(2)
    }

    fn write(&mut self, _offset: u64, _width: usize, value: u64) -> Effect {
        self.value = value;
        Effect::None
    }

    fn reset(&mut self) {
        *self = Self::default();
    }

    fn save(&self) -> Saved {
        let Self { value } = self;
        Saved { version: 1, state: (*value).into() }
    }

    fn load(&mut self, saved: &Saved) -> anyhow::Result<()> {
        self.value = serde_json::from_value(saved.state.clone())?;
        Ok(())
    }
}

fn main() -> anyhow::Result<()> {
    let memory = Memory::new(&[Span { start: RAM, size: 0x1000 }], false)?;
    memory.write(RAM, ASK)?;
    let vm = Vm::new(0)?;
    vm.map(&memory)?;
    let mut vcpu = parts::cpu(&vm)?;

    let mut devices = Builder::default();
    devices.place(SPACE, Span { start: 0x20, size: 1 }, Doubler::default())?;
    devices.place(SPACE, Span { start: 0xf4, size: 4 }, DebugExit)?;

    let stop = run_loop(&mut vcpu, &devices.finish(), &Flag::new(None, None), &mut Off);
    println!("the guest ended with {stop:?}");
    Ok(())
}
