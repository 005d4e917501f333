//! The run loop beside the same loop without a word of traces: `cargo xtask` compares their instructions, so that
//! "nothing when off" stays true.
//!
//! Invariant: [`bantam_loop_bare`] is [`run_loop`] with its hooks left out, and nothing else. Only the feature `loops` has
//! this module, and only that test has the feature.

use super::{Flag, Next, Stop, Vcpu, dispatch, run_loop};
use crate::bus::{Buses, Exit};
use crate::trace::Off;

/// The loop as machines run it when nobody looks in.
#[unsafe(no_mangle)]
pub fn bantam_loop_off(vcpu: &mut Vcpu, buses: &Buses, flag: &Flag) -> Stop {
    run_loop(vcpu, buses, flag, &mut Off)
}

/// The loop that knows of nobody who could.
#[unsafe(no_mangle)]
pub fn bantam_loop_bare(vcpu: &mut Vcpu, buses: &Buses, flag: &Flag) -> Stop {
    loop {
        if flag.is_raised()
            && let Some(stop) = flag.answer(vcpu)
        {
            return stop;
        }
        let result = vcpu.enter_guest();
        vcpu.catch_up(buses);
        let mut exit = vcpu.exit(result);
        let next = dispatch(&mut exit, buses);
        let spent = !matches!(exit, Exit::Interrupted) && flag.spend();
        match next {
            Next::Run if spent => return Stop::MaxExits,
            Next::Run => {}
            Next::Stop(Stop::Halted { .. }) => return Stop::Halted { interrupts: vcpu.interrupts_on() },
            Next::Stop(stop) => return stop,
        }
    }
}
