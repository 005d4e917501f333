//! The guests of the PC: real, protected and long mode.
//!
//! A flat guest starts at 0x1000 with every register and segment base 0 (real mode), or with flat segments and the stack
//! at the top of RAM; interrupts are off. Intel syntax; `//` starts a comment. A label's address in the guest is written
//! `.set guest_text_at, guest_text - guest + 0x1000`, then `offset guest_text_at` for the number and `[guest_text_at]`
//! for what is stored there.

/// What the assembler is told after each guest.
macro_rules! assembler_state {
    () => {
        ".code64"
    };
}

/// Starts both interrupt controllers (8259A): IRQ 0 is vector 0x20, and every IRQ is masked. The guest then writes the
/// mask it wants to port 0x21.
macro_rules! start_pic {
    () => {
        r#"
            mov al, 0x11            // ICW1: edge-triggered, cascaded, ICW4 follows
            out 0x20, al
            out 0xa0, al
            mov al, 0x20            // ICW2: the vector of the first IRQ
            out 0x21, al
            mov al, 0x28
            out 0xa1, al
            mov al, 4               // ICW3: the second controller is on IRQ 2 ...
            out 0x21, al
            mov al, 2               // ... and its number is 2
            out 0xa1, al
            mov al, 1               // ICW4: 8086 mode
            out 0x21, al
            out 0xa1, al
            mov al, 0xff            // OCW1: the mask
            out 0x21, al
            out 0xa1, al
        "#
    };
}

mod crash;
mod elf;
mod ends;
mod first;
mod linux;
mod modes;
mod multiboot;
mod serial;
mod smp;
mod tests;
mod time;

pub use crash::*;
pub use elf::{elf32, elf64};
pub use ends::{exit, poweroff, reset};
pub use first::{add, add_nasm, counter, reader};
pub use linux::linux_init;
pub use modes::{cpuid, hello_long, hello_protected, modes};
pub use multiboot::{multiboot, multiboot2};
pub use serial::{echo, echo_irq};
pub use smp::{smp, smp_halt_off, smp_spin};
pub use tests::{bench::*, machine::*, malice::*};
pub use time::{clock, timer};

list! {
    /// What `bantam example` lists.
    EXAMPLES:
    "add" add ["--memory", "4K", "--ram-base", "0x1000", "--reg", "rax=2", "--reg", "rbx=2"],
        "twelve bytes that add rax and rbx and print the digit",
        "4 and a newline; halts: 0";
    "add-nasm" add_nasm ["--memory", "4K", "--ram-base", "0x1000", "--reg", "rax=2", "--reg", "rbx=2"],
        "the same as NASM assembles it, where '\\n' is a backslash",
        "4 and a backslash; halts: 0";
    "counter" counter ["--load-at", "0x10000", "--entry", "0x1000:0", "--trace", "--max-exits", "10"],
        "writes 0, 1, 2 … to port 0x10 for ever; the trace shows the first ten",
        "nothing; --max-exits: 124";
    "reader" reader ["--load-at", "0x10000", "--entry", "0x1000:0", "--trace", "--max-exits", "10"],
        "reads port 0x10 for ever, where no device is",
        "nothing; --max-exits: 124";
    "hello-protected" hello_protected ["--cpu-mode", "protected"],
        "prints a line from 32-bit protected mode",
        "Hello from protected mode and a newline; halts: 0";
    "hello-long" hello_long ["--cpu-mode", "long"],
        "prints a line from 64-bit long mode",
        "Hello from long mode and a newline; halts: 0";
    "modes" modes [],
        "climbs from real to protected to long mode by itself",
        "real, protected, long, a line each; halts: 0";
    "cpuid" cpuid ["--cpu-mode", "protected"],
        "prints the CPU's vendor and whether it has long mode",
        "vendor: twelve letters; long mode: yes or no; halts: 0";
    "echo" echo [],
        "sends serial input back, asking for it again and again; ctrl-D ends it",
        "its input up to the first byte 4 or the end; halts: 0";
    "echo-irq" echo_irq ["--irqchip", "kernel"],
        "sends serial input back, sleeping until an interrupt tells of some; ctrl-D ends it",
        "its input up to the first byte 4 or the end; halts with interrupts off: 0";
    "timer" timer ["--irqchip", "kernel"],
        "counts three interrupts of the interval timer, a twentieth of a second apart",
        "tick, three lines; writes 3 to the debug-exit port: 7";
    "clock" clock [],
        "prints the date and the time of the CMOS clock",
        "as in 2026-11-21T08:15:00Z; halts: 0";
    "smp" smp ["--cpu-mode", "protected", "--cpus", "4", "--irqchip", "kernel"],
        "wakes all other CPUs; every CPU says its number",
        "CPU n, one line for each, in any order; all halt with interrupts off: 0";
    "multiboot" multiboot [],
        "a Multiboot 1 kernel that prints what the boot loader tells it",
        "magic, loader, command line, memory and modules, a line each; halts: 0";
    "multiboot2" multiboot2 [],
        "a Multiboot 2 kernel that prints what the boot loader tells it",
        "magic, loader, command line, memory and modules, a line each; halts: 0";
    "elf32" elf32 [],
        "a 32-bit ELF file, headers written by hand; looks whether its bss is zero",
        "Hello from a 32-bit ELF file, bss is zero, a line each; halts: 0";
    "elf64" elf64 [],
        "a 64-bit ELF file, headers written by hand; looks whether its bss is zero",
        "Hello from a 64-bit ELF file, bss is zero, a line each; halts: 0";
    "exit" exit [],
        "ends the machine with status 43 by way of the debug-exit port",
        "nothing; writes 21 to the debug-exit port: 43";
    "poweroff" poweroff [],
        "switches the machine off",
        "nothing; power-off: 0";
    "reset" reset [],
        "resets the machine, which ends it unless --reboot is given",
        "nothing; reset: 0";
    "crash" crash ["--cpu-mode", "long"],
        "reads memory that is not mapped, with nobody to handle the fault",
        "nothing; triple fault: 126, with rip, rbx and (on Intel CPUs and under PVM) cr2 = 0xdeadbeef000";
    "crash-idt" crash_idt ["--cpu-mode", "long", "--memory", "8M"], "a page that would be mapped on demand, but nobody has loaded an IDT",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-idt-unmapped" crash_idt_unmapped ["--cpu-mode", "long", "--memory", "8M"], "an IDT at an address that the page tables do not map",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-gates" crash_gates ["--cpu-mode", "long", "--memory", "8M"], "an IDT whose gates are all zeroes",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-handler" crash_handler ["--cpu-mode", "long", "--memory", "8M"], "an IDT whose gates lead to where no code is",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-gdt" crash_gdt ["--cpu-mode", "long", "--memory", "8M"], "an empty GDT, and a segment register loaded from it",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-stack" crash_stack ["--cpu-mode", "long", "--memory", "8M"], "a call with the stack in unmapped memory",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-tables" crash_tables ["--cpu-mode", "long", "--memory", "8M"], "CR3 loaded with a page of zeroes",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-readonly" crash_readonly ["--cpu-mode", "long", "--memory", "8M"], "a write to a page that may not be written",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-noexec" crash_noexec ["--cpu-mode", "long", "--memory", "8M"], "a jump into a page that may not be executed",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-zeroes" crash_zeroes ["--cpu-mode", "long", "--memory", "8M"], "a call through a null pointer, to zeroes",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-load-address" crash_load_address ["--cpu-mode", "long", "--memory", "8M"], "code that is linked for another address than it is loaded at",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-vex" crash_vex ["--cpu-mode", "long", "--memory", "8M"], "an AVX instruction that nobody has switched on",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-sse" crash_sse ["--cpu-mode", "long", "--memory", "8M"], "an SSE instruction, SSE being switched off",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-div0" crash_div0 ["--cpu-mode", "long", "--memory", "8M"], "a division by zero",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-ud" crash_ud ["--cpu-mode", "long", "--memory", "8M"], "ud2, which compilers put where no program must arrive",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-canonical" crash_canonical ["--cpu-mode", "long", "--memory", "8M"], "a read through a pointer that is no canonical address",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-msr" crash_msr ["--cpu-mode", "long", "--memory", "8M"], "a write to a model-specific register that no CPU has",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-int" crash_int ["--cpu-mode", "long", "--memory", "8M"],
        "a system call by int 0x80, with no IDT",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-iret" crash_iret ["--cpu-mode", "long", "--memory", "8M"], "a return from an interrupt that never was",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-ltr" crash_ltr ["--cpu-mode", "long", "--memory", "8M"], "a task register that the GDT does not have",
        "nothing; a triple fault or an internal error: 126, and the report names it";
    "crash-pae" crash_pae ["--cpu-mode", "protected"], "long mode without PAE",
        "nothing; a triple fault: 126, and the report names it";
    "crash-past" crash_past ["--cpu-mode", "long", "--memory", "2M"], "code that runs out of the machine's RAM",
        "nothing; an internal error: 126, and the report names it";
}

list! {
    /// What the tests and the bench run.
    TESTS:
    "spin-real" spin_real [], "spins in real mode with interrupts off", "nothing; never ends";
    "spin-long" spin_long ["--cpu-mode", "long"], "spins in long mode with interrupts off", "nothing; never ends";
    "halt-if-on" halt_if_on [], "halts with interrupts on, again and again",
        "nothing; without an irqchip the first HLT ends it: 0, with a hint; with one it sleeps for ever";
    "halt-off" halt_off [], "halts with interrupts off", "nothing; 0 whatever the irqchip";
    "smp-halt-off" smp_halt_off ["--cpu-mode", "protected", "--cpus", "4", "--irqchip", "kernel"],
        "all CPUs say so and halt with interrupts off", "one `h` for each CPU; all halted: 0";
    "smp-spin" smp_spin ["--cpu-mode", "protected", "--cpus", "4", "--irqchip", "kernel"],
        "all CPUs say so and spin with interrupts off", "one `s` for each CPU; never ends";
    "strings" strings ["--cpu-mode", "protected"],
        "rep outs and rep ins of each width, forwards and backwards",
        "Hello, a newline, olleH, a newline; 1, or 2n + 1 if check n failed";
    "outs-huge" outs_huge ["--cpu-mode", "protected"],
        "rep outsb of 4 GiB to a port without a device", "nothing; does not end in any useful time";
    "mmio-edge" mmio_edge ["--cpu-mode", "long", "--memory", "2M"],
        "reads and writes of each width past and across the end of RAM",
        "nothing; 1, or 2n + 1 if check n failed";
    "serial-wide" serial_wide ["--cpu-mode", "protected"],
        "16- and 32-bit accesses to the serial port's 8-bit registers",
        "wW and a newline; 1, or 2n + 1 if check n failed";
    "vex" vex ["--cpu-mode", "long"], "one VEX-encoded instruction",
        "nothing; 126: an internal error where KVM emulates, a triple fault elsewhere";
    "high-and-low" high_and_low ["--cpu-mode", "long"], "executes out beyond 4 GiB, below, and in a segment",
        "nothing; halts: 0";
    "out100k-none" out100k_none [], "100,000 times out to a port without a device", "nothing; halts: 0";
    "out100k-serial" out100k_serial [], "100,000 times out to the serial port", "100,000 times `x`; halts: 0";
    "print-1m" print_1m ["--cpu-mode", "long", "--reg", "rbx=16384"],
        "prints rbx lines of 64 bytes", "rbx lines; halts: 0";
    "serial-flood-read" serial_flood_read ["--cpu-mode", "protected"],
        "reads serial input slowly and drops it", "done and a newline at the end of input; halts: 0";
    "ports-sweep" ports_sweep ["--cpu-mode", "protected"],
        "reads and writes nearly every port, some in two widths",
        "one or more bytes, then `swept` and a newline; halts: 0";
    "mmio-sweep" mmio_sweep ["--cpu-mode", "long"],
        "reads and writes the device hole in each width, mostly unaligned", "swept and a newline; halts: 0";
}
