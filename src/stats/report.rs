//! What was counted, as JSON and as a table for people.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::Serialize;

use super::addresses::Hot;
use super::histogram::Counts;
use super::kvm::{Counters, KvmStats};
use super::process::{self, Memory};
use super::{Cpu, Devices, lock, name_of};
use crate::bus::Space;
use crate::{explain, irq};

/// How many of the most used addresses are told.
const HOT: usize = 10;

/// How long exits of one kind took to answer, in nanoseconds; the largest is exact, the others at most 6 % too high.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Latency {
    p50: u64,
    p90: u64,
    p99: u64,
    max: u64,
}

impl Latency {
    fn of(counts: &Counts) -> Self {
        Self { p50: counts.rank(50), p90: counts.rank(90), p99: counts.rank(99), max: counts.largest }
    }
}

/// Exits of one reason, at one device, of one CPU.
#[derive(Debug, Serialize)]
struct Kind {
    reason: &'static str,
    device: Option<&'static str>,
    vcpu: usize,
    count: u64,
    latency_ns: Latency,
    #[serde(skip)]
    counts: Counts,
}

#[derive(Debug, Serialize)]
struct Exits {
    total: u64,
    per_second: f64,
    /// KVM_RUN calls that a signal of Bantam's own ended; no part of the total.
    interrupted: u64,
    by: Vec<Kind>,
}

/// Where the time of one CPU went. KVM's own work cannot be told from the guest's.
#[derive(Debug, Serialize)]
struct CpuTime {
    vcpu: usize,
    /// In KVM_RUN, without the time halted where that is known.
    guest_and_kvm_ns: u64,
    /// Answering exits.
    vmm_ns: u64,
    /// Halted inside KVM; null where this host's KVM does not say.
    halted_ns: Option<u64>,
    /// Exits that KVM answered by itself, and those that it brought to Bantam; null where it does not say.
    kvm_exits: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Time {
    uptime_ns: u64,
    cpus: Vec<CpuTime>,
}

#[derive(Debug, Serialize)]
struct Address {
    space: &'static str,
    addr: u64,
    write: bool,
    device: Option<&'static str>,
    count: u64,
    /// The count may be too high by this.
    over: u64,
}

#[derive(Debug, Serialize)]
struct Interrupts {
    /// Edges and levels that devices raised.
    raised: u64,
    /// What KVM injected, its own devices' and other CPUs' included; null where it does not say.
    injected: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Ioctls {
    kvm_run: u64,
    /// Calls that made and started the machine, as `--explain` tells them.
    setup: u64,
}

/// Everything that was counted.
#[derive(Debug, Serialize)]
pub struct Report {
    exits: Exits,
    time: Time,
    addresses: Vec<Address>,
    interrupts: Interrupts,
    ioctls: Ioctls,
    memory: Memory,
    /// Page faults of the guest that KVM answered; null where it does not say.
    guest_faults: Option<u64>,
}

fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

fn rate(count: u64, uptime: u64) -> f64 {
    if uptime == 0 { 0.0 } else { (count as f64 / seconds(uptime) * 10.0).round() / 10.0 }
}

/// Reads the counters of `cpus`; `now` is the monotonic clock.
pub fn of(cpus: &[Arc<Cpu>], devices: &Devices, uptime: u64, now: u64) -> Report {
    let (mut by, mut times, mut hot) = (Vec::new(), Vec::new(), Vec::new());
    let (mut interrupted, mut all) = (0, Counters::default());
    for (vcpu, cpu) in cpus.iter().enumerate() {
        by.extend(kinds(vcpu, cpu, &devices.names));
        cpu.addresses.add_to(&mut hot);
        interrupted += cpu.interrupted.load(Ordering::Relaxed);
        let kvm = lock(&cpu.kvm);
        let mut counters = kvm.0;
        counters.merge(kvm.1.as_ref().map(KvmStats::read).unwrap_or_default());
        all.merge(counters);
        times.push(time(vcpu, cpu, &counters, now));
    }
    let total = by.iter().map(|kind| kind.count).sum();
    by.sort_by_key(|kind| (std::cmp::Reverse(kind.count), kind.vcpu));
    Report {
        ioctls: Ioctls { kvm_run: total + interrupted, setup: explain::count() },
        exits: Exits { total, per_second: rate(total, uptime), interrupted, by },
        time: Time { uptime_ns: uptime, cpus: times },
        addresses: addresses(hot, devices),
        interrupts: Interrupts { raised: irq::raised(), injected: all.injected },
        memory: process::memory(),
        guest_faults: all.faults,
    }
}

fn kinds(vcpu: usize, cpu: &Cpu, devices: &[&'static str]) -> Vec<Kind> {
    let rows = cpu.rows.iter().enumerate().filter_map(|(row, histogram)| Some((row, histogram.get()?)));
    rows.map(|(row, histogram)| {
        let mut counts = Counts::default();
        histogram.add_to(&mut counts);
        let (reason, device) = name_of(row, devices);
        Kind { reason, device, vcpu, count: counts.count, latency_ns: Latency::of(&counts), counts }
    })
    .collect()
}

fn time(vcpu: usize, cpu: &Cpu, counters: &Counters, now: u64) -> CpuTime {
    let entered = cpu.entered.load(Ordering::Relaxed);
    // A CPU that is in the guest now has been there since it entered.
    let since = if entered == 0 { 0 } else { now.saturating_sub(entered) };
    let inside = cpu.inside.load(Ordering::Relaxed).saturating_add(since);
    CpuTime {
        vcpu,
        guest_and_kvm_ns: inside.saturating_sub(counters.halted_ns.unwrap_or(0)),
        vmm_ns: cpu.outside.load(Ordering::Relaxed),
        halted_ns: counters.halted_ns,
        kvm_exits: counters.exits,
    }
}

fn addresses(mut hot: Vec<Hot>, devices: &Devices) -> Vec<Address> {
    hot.sort_by_key(|hot| std::cmp::Reverse(hot.count));
    hot.truncate(HOT);
    let named = |hot: Hot| {
        let mut map = devices.map.iter();
        let owner = map.find(|range| range.space == hot.space && (range.base..=range.last).contains(&hot.addr));
        Address {
            space: if hot.space == Space::Pio { "io" } else { "mmio" },
            addr: hot.addr,
            write: hot.write,
            device: owner.map(|range| range.name),
            count: hot.count,
            over: hot.over,
        }
    };
    hot.into_iter().map(named).collect()
}

/// A time in at most four digits.
fn short(nanoseconds: u64) -> String {
    let value = nanoseconds as f64;
    match nanoseconds {
        0..1_000 => format!("{nanoseconds} ns"),
        1_000..1_000_000 => format!("{:.1} µs", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", value / 1e6),
        _ => format!("{:.1} s", value / 1e9),
    }
}

/// A number with its thousands set apart.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".into() } else { format!("{:.1} %", part as f64 / whole as f64 * 100.0) }
}

fn whole(number: f64) -> u64 {
    // A rate is never negative; the cast stops at the largest number.
    number as u64
}

impl Report {
    /// Exits a second since the start.
    pub fn per_second(&self) -> f64 {
        self.exits.per_second
    }

    /// The table for people. Nothing in it is the guest's but numbers.
    pub fn table(&self) -> String {
        let mut text = format!(
            "bantam: statistics after {:.1} s: {} exits, {} a second\n",
            seconds(self.time.uptime_ns),
            grouped(self.exits.total),
            grouped(whole(self.exits.per_second)),
        );
        // Writing to a String cannot fail.
        let _ = self.table_of_exits(&mut text);
        let _ = self.table_of_times(&mut text);
        let _ = self.rest(&mut text);
        text.truncate(text.trim_end().len());
        text
    }

    fn table_of_exits(&self, text: &mut String) -> std::fmt::Result {
        let mut sums: Vec<(&str, &str, Counts)> = Vec::new();
        for kind in &self.exits.by {
            let device = kind.device.unwrap_or("-");
            match sums.iter_mut().find(|(reason, at, _)| (*reason, *at) == (kind.reason, device)) {
                Some((.., counts)) => counts.merge(&kind.counts),
                None => sums.push((kind.reason, device, kind.counts.clone())),
            }
        }
        sums.sort_by_key(|(.., counts)| std::cmp::Reverse(counts.count));
        writeln!(
            text,
            "  {:14}{:>14}{:>9}  {:14}{:>9}{:>9}{:>9}{:>9}",
            "reason", "exits", "share", "device", "p50", "p90", "p99", "max"
        )?;
        for (reason, device, counts) in &sums {
            let (count, share) = (grouped(counts.count), percent(counts.count, self.exits.total));
            let Latency { p50, p90, p99, max } = Latency::of(counts);
            let [p50, p90, p99, max] = [p50, p90, p99, max].map(short);
            writeln!(text, "  {reason:14}{count:>14}{share:>9}  {device:14}{p50:>9}{p90:>9}{p99:>9}{max:>9}")?;
        }
        Ok(())
    }

    fn table_of_times(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "  {:14}{:>14}{:>9}{:>9}{:>16}", "time", "guest and KVM", "VMM", "halted", "exits to KVM")?;
        for cpu in &self.time.cpus {
            let all = cpu.guest_and_kvm_ns + cpu.vmm_ns + cpu.halted_ns.unwrap_or(0);
            let halted = cpu.halted_ns.map_or("unknown".into(), |ns| percent(ns, all));
            let exits = cpu.kvm_exits.map_or("unknown".into(), grouped);
            let (name, guest) = (format!("vCPU {}", cpu.vcpu), percent(cpu.guest_and_kvm_ns, all));
            writeln!(text, "  {name:14}{guest:>14}{:>9}{halted:>9}{exits:>16}", percent(cpu.vmm_ns, all))?;
        }
        if self.time.cpus.iter().any(|cpu| cpu.halted_ns.is_none()) {
            writeln!(text, "  this host's KVM does not say how long a CPU was halted: it counts as guest")?;
        }
        Ok(())
    }

    fn rest(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "  {:14}{:>14}{:>9}  device", "address", "accesses", "way")?;
        for hot in &self.addresses {
            let way = if hot.write { "write" } else { "read" };
            let about = if hot.over > 0 { format!(", at most {} too many", grouped(hot.over)) } else { String::new() };
            let (addr, count) = (format!("{} {:#x}", hot.space, hot.addr), grouped(hot.count));
            writeln!(text, "  {addr:14}{count:>14}{way:>9}  {}{about}", hot.device.unwrap_or("-"))?;
        }
        let injected = self.interrupts.injected.map_or("an unknown number".into(), grouped);
        writeln!(
            text,
            "  interrupts    {} raised by devices, {injected} injected by KVM",
            grouped(self.interrupts.raised)
        )?;
        let (run, setup) = (grouped(self.ioctls.kvm_run), self.ioctls.setup);
        writeln!(
            text,
            "  ioctls        {run} KVM_RUN, {} of them ended by a signal; {setup} to set up",
            self.exits.interrupted
        )?;
        let Memory { monitor_kib, guest_kib, minor_faults, major_faults, .. } = self.memory;
        let (monitor, guest) = (grouped(monitor_kib), grouped(guest_kib));
        writeln!(text, "  memory        {monitor} KiB of the monitor's, {guest} KiB of guest RAM in use")?;
        let faults = self.guest_faults.map_or("an unknown number".into(), grouped);
        writeln!(
            text,
            "  page faults   {} of the process, {} from disk; {faults} of the guest",
            grouped(minor_faults + major_faults),
            grouped(major_faults)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_made_for_people() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([7, 1_250, 3_500_000, 12_000_000_000].map(short), ["7 ns", "1.2 µs", "3.5 ms", "12.0 s"]);
        assert_eq!((percent(1, 3), percent(1, 0)), ("33.3 %".into(), "-".into()));
        assert_eq!(rate(3, 2_000_000_000), 1.5);
    }

    #[test]
    fn a_cpu_in_the_guest_has_been_there_since_it_entered() {
        let cpu = Cpu::default();
        cpu.entered.store(100, Ordering::Relaxed);
        cpu.inside.store(50, Ordering::Relaxed);
        let halted = Counters { halted_ns: Some(30), ..Counters::default() };
        assert_eq!(time(0, &cpu, &halted, 400).guest_and_kvm_ns, 320);
        assert_eq!(time(0, &cpu, &Counters::default(), 400).guest_and_kvm_ns, 350);
        assert_eq!(time(0, &cpu, &Counters { halted_ns: Some(900), ..halted }, 400).guest_and_kvm_ns, 0);
    }

    #[test]
    fn an_empty_report_is_a_table_too() {
        let report = of(&[Arc::default()], &Devices::default(), 0, 0);
        let table = report.table();
        assert!(table.starts_with("bantam: statistics after 0.0 s: 0 exits, 0 a second\n"), "{table}");
        assert!(table.contains("vCPU 0") && table.contains("unknown"), "{table}");
    }
}
