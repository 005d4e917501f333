//! The guests of the arm64 machine.
//!
//! A flat guest starts at the beginning of RAM (0x40000000) at EL1, MMU, caches and interrupts off, with the stack at the
//! top of RAM and the device tree's address in x0. Every address is relative to the program counter (`adr`), so it
//! runs wherever it is loaded. `//` starts a comment.
//!
//! Two things are asked of all of them. With the MMU off all memory is Device memory, where an access that is not aligned
//! faults. And an access to a device is one load or store of one register, neither a pair nor with an address that
//! moves on (`[x0], 1`): only for those the CPU tells KVM what is accessed (Arm ARM, ESR_EL2.ISS, ISV).
//!
//! x20 is the serial port (PL011): 0 data, 0x18 flags, 0x30 control, 0x38 interrupt mask, 0x44 interrupt clear. Bantam's is
//! always ready for more. WFI may return for no reason, so it stands in a loop.

/// What the assembler is told after each guest: nothing.
macro_rules! assembler_state {
    () => {
        ""
    };
}

/// Prints the string at `$text`, which ends in a zero. Clobbers x0 and w1.
macro_rules! say {
    ($text:literal) => {
        concat!("adr x0, ", $text, say!())
    };
    () => {
        r#"
    7:      ldrb w1, [x0], 1
            cbz w1, 8f
            str w1, [x20]
            b 7b
    8:
        "#
    };
}

/// Prints the sixteen hexadecimal digits of x0. Clobbers x1 to x3.
macro_rules! say_number {
    () => {
        r#"
            mov w1, 60
    7:      lsr x2, x0, x1
            and w2, w2, 15
            add w3, w2, 'a' - 10
            cmp w2, 10
            add w2, w2, '0'
            csel w2, w2, w3, lo
            str w2, [x20]
            subs w1, w1, 4
            b.pl 7b
        "#
    };
}

/// Starts the interrupt controller, GICv3 or GICv2, with every interrupt masked. After it x21 is the distributor, whose
/// register 0x104 unmasks the interrupts from 32 on; x22 + 0x100 unmasks those below, which are this CPU's own.
/// Keeps x19 and x23 for the macros below; clobbers x9 and x10.
macro_rules! start_gic {
    () => {
        r#"
            mov x21, 0x08000000
            mov x23, 0x08010000     // GICv2's CPU interface
            mrs x9, id_aa64pfr0_el1
            ubfx x19, x9, 24, 4     // GIC: not 0 if the CPU interface is in system registers, as in GICv3
            cbz x19, 7f
            mov w9, 0x12            // GICD_CTLR: affinity routing, interrupts of group 1
            str w9, [x21]
            mov x22, 0x080b0000     // the second frame of CPU 0's redistributor
            mov w9, -1              // IGROUPR: all are in group 1
            str w9, [x22, 0x80]
            str w9, [x21, 0x84]
            mov x9, 0xff            // every priority may interrupt
            msr icc_pmr_el1, x9
            mov x9, 1
            msr icc_igrpen1_el1, x9
            isb
            b 8f
    7:      mov x22, x21
            mov w9, 1
            str w9, [x21]           // GICD_CTLR
            strb w9, [x21, 0x821]   // GICD_ITARGETSR: interrupt 33 is for CPU 0
            mov w10, 0xff
            str w10, [x23, 4]       // GICC_PMR
            str w9, [x23]           // GICC_CTLR
    8:
        "#
    };
}

/// The pending interrupt's number to w9, which makes it active; 1023 if there is none.
macro_rules! take_interrupt {
    () => {
        r#"
            cbz x19, 7f
            mrs x9, icc_iar1_el1
            b 8f
    7:      ldr w9, [x23, 0x0c]     // GICC_IAR
    8:
        "#
    };
}

/// The interrupt w9 has been dealt with.
macro_rules! end_interrupt {
    () => {
        r#"
            cbz x19, 7f
            msr icc_eoir1_el1, x9
            b 8f
    7:      str w9, [x23, 0x10]     // GICC_EOIR
    8:
        "#
    };
}

/// Turns the MMU on. The first 4 GiB are where they were, all but the first of them Normal memory: there an access may have
/// any alignment. The first is as `$devices` says: 0x00 for Device memory, 0x44 for Normal. The table takes the 4 KiB that begin 64 KiB after `$start`, which is at a page's
/// beginning and is followed by zeroes. Clobbers x9 and x10.
macro_rules! start_mmu {
    ($start:literal, $devices:literal) => {
        concat!(
            "adr x9, ",
            $start,
            r#"
            add x9, x9, 0x10, lsl 12
            mov x10, 0x401          // a block of 1 GiB at 0, accessed, attributes 0
            str x10, [x9]
            mov x10, 0x705          // at 1 GiB: shareable, attributes 1
            movk x10, 0x4000, lsl 16
            str x10, [x9, 8]
            movk x10, 0x8000, lsl 16
            str x10, [x9, 16]
            movk x10, 0xc000, lsl 16
            str x10, [x9, 24]
            msr ttbr0_el1, x9
            mov x10, 0xff00 + "#,
            $devices,
            r#"
            msr mair_el1, x10
            mov x10, 0x19           // 39 bits of address, pages of 4 KiB,
            movk x10, 0x80, lsl 16  // and no second table
            msr tcr_el1, x10
            dsb sy
            isb
            mrs x10, sctlr_el1
            orr x10, x10, 1
            msr sctlr_el1, x10
            isb
        "#
        )
    };
}

mod crash;
mod elf;
mod ends;
mod fdt;
mod first;
mod linux;
mod modes;
mod serial;
mod smp;
mod tests;
mod time;

pub use crash::*;
pub use elf::elf64;
pub use ends::{exit, poweroff, reset};
pub use fdt::fdt;
pub use first::{add, counter, hello, reader};
pub use linux::linux_init;
pub use modes::{cpuid, hello_el1, modes};
pub use serial::{echo, echo_irq};
pub use smp::{smp, smp_halt_off, smp_spin};
pub use tests::{bench::*, machine::*, malice::*};
pub use time::{clock, timer};

list! {
    /// What `bantam example` lists.
    EXAMPLES:
    "hello" hello ["--memory", "4K", "--ram-base", "0x10000", "--debugcon", "mmio:0x996", "--until", "\n"],
        "twelve instructions that store Hello, byte by byte, to an address outside RAM",
        "Hello and a newline, which ends it: 0";
    "add" add ["--memory", "4K", "--reg", "x0=2", "--reg", "x1=2"],
        "adds x0 and x1 and prints the digit",
        "4 and a newline; waits for no interrupt: 0";
    "counter" counter ["--trace", "--max-exits", "10"],
        "writes 0, 1, 2 … to address 0x10 for ever; the trace shows the first ten",
        "nothing; --max-exits: 124";
    "reader" reader ["--trace", "--max-exits", "10"],
        "reads address 0x10 for ever, where no device is",
        "nothing; --max-exits: 124";
    "hello-el1" hello_el1 [],
        "prints a line with the exception level it runs at",
        "Hello from EL1 and a newline; waits for no interrupt: 0";
    "modes" modes [],
        "turns the MMU on, then goes down to EL0, where programs run",
        "physical, virtual, user, a line each; waits for no interrupt: 0";
    "cpuid" cpuid [],
        "prints the CPU's identification register and the size of its addresses",
        "MIDR_EL1 in hexadecimal and a number of bits, a line each; waits for no interrupt: 0";
    "echo" echo [],
        "sends serial input back, asking for it again and again; ctrl-D ends it",
        "its input up to the first byte 4 or the end; waits for no interrupt: 0";
    "echo-irq" echo_irq [],
        "sends serial input back, sleeping until an interrupt tells of some; ctrl-D ends it",
        "its input up to the first byte 4 or the end; waits with its interrupt off: 0";
    "timer" timer [],
        "counts three interrupts of the CPU's virtual timer, a twentieth of a second apart",
        "tick, three lines; writes 3 to the debug-exit word: 7";
    "clock" clock [],
        "prints the date and the time of the real-time clock",
        "as in 2026-11-21T08:15:00Z; waits for no interrupt: 0";
    "smp" smp ["--cpus", "4"],
        "every CPU says its number and wakes the next",
        "CPU n, one line for each; all wait for no interrupt: 0";
    "fdt" fdt [],
        "prints what the device tree says of machine, memory, CPUs and command line",
        "magic right, then a line each, or: no device tree; waits for no interrupt: 0";
    "elf64" elf64 [],
        "a 64-bit ELF file, headers written by hand; looks whether its bss is zero",
        "Hello from a 64-bit ELF file, bss is zero, a line each; waits for no interrupt: 0";
    "exit" exit [],
        "ends the machine with status 43 by way of the debug-exit word",
        "nothing; writes 21 to the debug-exit word: 43";
    "poweroff" poweroff [],
        "switches the machine off",
        "nothing; PSCI SYSTEM_OFF: 0";
    "reset" reset [],
        "resets the machine, which ends it unless --reboot is given",
        "nothing; PSCI SYSTEM_RESET: 0";
    "crash" crash [],
        "loads two registers at once from an address without memory, which KVM cannot emulate",
        "nothing; KVM_EXIT_ARM_NISV: 126, with pc and x2 = 0xdead000";
    "crash-vectors" crash_vectors [],
        "makes a system call, and nobody has set a vector table", "nothing; an exception without end: 126";
    "crash-vectors-unmapped" crash_vectors_unmapped [],
        "has a vector table where no memory is", "nothing; an exception without end: 126";
    "crash-vectors-empty" crash_vectors_empty [],
        "has a vector table that nobody has filled in", "nothing; an exception without end: 126";
    "crash-handler" crash_handler [],
        "has an exception handler that takes an exception itself", "nothing; an exception that does not end: 126";
    "crash-undefined" crash_undefined [],
        "executes an instruction that is none", "nothing; an exception without end: 126";
    "crash-zeroes" crash_zeroes [],
        "calls a function where nothing was loaded: zeroes", "nothing; an exception without end: 126";
    "crash-jump" crash_jump [],
        "jumps to where no memory is", "nothing; an exception without end: 126";
    "crash-pc" crash_pc [],
        "jumps to an address that is no multiple of 4", "nothing; an exception without end: 126";
    "crash-unaligned" crash_unaligned [],
        "takes a lock at an address that is not aligned to its size", "nothing; an exception without end: 126";
    "crash-stack" crash_stack [],
        "has a stack pointer to nowhere; its handler pushes to it too", "nothing; an exception without end: 126";
    "crash-tables" crash_tables [],
        "turns the MMU on with empty tables", "nothing; an exception without end: 126";
    "crash-translation" crash_translation [],
        "reads an address that no page table maps", "nothing; an exception without end: 126";
    "crash-permission" crash_permission [],
        "writes to memory that is mapped read-only", "nothing; an exception without end: 126";
    "crash-noexec" crash_noexec [],
        "jumps to memory that is mapped as data", "nothing; an exception without end: 126";
    "crash-brk" crash_brk [],
        "panics, as compilers do it", "nothing; an exception without end: 126";
    "crash-el" crash_el [],
        "returns to EL2, which it never came from", "nothing; an exception without end: 126";
    "crash-sysreg" crash_sysreg [],
        "reads a register of the hypervisor's level", "nothing; an exception without end: 126";
    "crash-fpu" crash_fpu [],
        "uses a floating-point register while they are switched off", "nothing; an exception without end: 126";
}

list! {
    /// What the tests and the bench run.
    TESTS:
    "spin" spin [], "spins with interrupts off", "nothing; never ends";
    "spin-wfe" spin_wfe [], "waits for events that nobody sends", "nothing; never ends";
    "halt-if-on" halt_if_on [], "waits for serial input and ignores it",
        "nothing; sleeps for ever";
    "halt-off" halt_off [], "waits with no interrupt enabled", "nothing; 0";
    "smp-halt-off" smp_halt_off ["--cpus", "4"],
        "all CPUs say so and wait with no interrupt enabled", "one `h` for each CPU; all wait: 0";
    "smp-spin" smp_spin ["--cpus", "4"],
        "all CPUs say so and spin", "one `s` for each CPU; never ends";
    "mmio-edge" mmio_edge ["--memory", "2M"],
        "reads and writes of each width past and across the end of RAM",
        "nothing; 1, or 2n + 1 if check n failed";
    "mmio-sweep" mmio_sweep [],
        "reads and writes the addresses below RAM in each width, mostly unaligned", "swept and a newline: 0";
    "serial-wide" serial_wide [],
        "8-, 16- and 64-bit accesses to the serial port's registers",
        "bhwd and a newline; 1, or 2n + 1 if check n failed";
    "nisv" nisv ["--reg", "x1=0"],
        "an access outside RAM that KVM cannot emulate; x1 says which of four",
        "nothing; KVM_EXIT_ARM_NISV: 126";
    "cache-hole" cache_hole [], "cleans and invalidates caches where no memory is",
        "nothing; 1";
    "psci" psci ["--cpus", "2"], "calls of PSCI that must be refused",
        "nothing; 1, or 2n + 1 if check n failed";
    "irq-storm" irq_storm [], "a timer's interrupt that is never silenced", "nothing; never ends";
    "abort-storm" abort_storm [], "executes where no memory is, and so does its fault's handler",
        "nothing; 126 within seconds: it is lost in its own exceptions";
    "add-off" add_off ["--memory", "4K", "--reg", "x0=2", "--reg", "x1=2"],
        "adds x0 and x1, prints the digit and switches the machine off", "4 and a newline; PSCI SYSTEM_OFF: 0";
    "out100k-none" out100k_none [], "100,000 stores to an address without a device",
        "nothing; waits for no interrupt: 0";
    "out100k-serial" out100k_serial [], "100,000 stores to the serial port",
        "100,000 times `x`; waits for no interrupt: 0";
    "print-1m" print_1m ["--reg", "x19=16384"],
        "prints x19 lines of 64 bytes", "x19 lines; waits for no interrupt: 0";
    "serial-flood-read" serial_flood_read [],
        "reads serial input slowly and drops it", "done and a newline at the end of input: 0";
}
