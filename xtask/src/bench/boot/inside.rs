//! The measurement in the host: starts a monitor, waits for the guest's line, reads what KVM counted so far.
//!
//! Invariant: nothing runs between the start and the line but the monitor. Both ends of the time are read from the same
//! clock that the kernel's trace of the first entry into the guest uses.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::arch::Arch;

/// The kernel's trace events of KVM.
const EVENTS: &str = "/sys/kernel/debug/tracing/events/kvm";
const TRACE: &str = "/sys/kernel/debug/tracing";

/// Folders of KVM's own counts, one for each machine.
const COUNTS: &str = "/sys/kernel/debug/kvm";

/// What the guest's first process prints, and a line of the same length after it.
const LINE: &[u8] = b"init";
const SECOND: &[u8] = b"more";

/// How long a monitor may take to end after its guest did.
const ENDING: Duration = Duration::from_secs(3);

/// Measures and prints lines of a key and values.
pub fn measure(name: &str, cmdline: &str, folder: &Path) -> Result<()> {
    trace()?;
    let stats = folder.join("stats.json");
    let mut command = command(name, cmdline, folder, &stats)?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let start = now()?;
    let mut child = command.spawn().with_context(|| crate::sh::words(&command))?;
    let out = child.stdout.take().context("no stdout")?;
    let mut out = BufReader::new(out);
    let came = wait_for(LINE, &mut out)?;
    let init = now()?;
    if let Some(entry) = first_entry()? {
        println!("entry {}", entry.saturating_sub(start));
    }
    match came {
        Ok(()) => {}
        Err(_) if name == super::FLOOR => return Ok(()),
        Err(shown) => bail!("{name} ended ({:?}) before the guest's init:\n{shown}", child.wait()),
    }
    let (counts, exits) = (counts(), histogram());
    println!("init {}", init - start);
    counts.iter().for_each(|(name, count)| println!("kvm {name} {count}"));
    exits.iter().for_each(|(reason, count)| println!("user {reason} {count}"));
    if wait_for(SECOND, &mut out)?.is_ok() {
        let sum = |exits: &[(String, u64)]| exits.iter().map(|(_, count)| count).sum::<u64>();
        println!("line {}", sum(&histogram()).saturating_sub(sum(&exits)));
    }
    end(&mut child, out)?;
    if let Ok(json) = fs::read_to_string(&stats) {
        by_device(&json).iter().for_each(|(kind, count)| println!("device {count} {kind}"));
    }
    Ok(())
}

/// Waits for a line of the guest's; else gives all that it has shown until its end.
fn wait_for(wanted: &[u8], out: &mut impl BufRead) -> Result<std::result::Result<(), String>> {
    let mut shown = Vec::new();
    loop {
        let before = shown.len();
        if out.read_until(b'\n', &mut shown)? == 0 {
            return Ok(Err(String::from_utf8_lossy(&shown).into_owned()));
        }
        if shown.get(before..).is_some_and(|line| line.trim_ascii() == wanted) {
            return Ok(Ok(()));
        }
    }
}

/// Time, in nanoseconds of the clock that the trace is told to use.
fn now() -> Result<u64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec, where `time` is one.
    #[allow(unsafe_code)]
    unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time)
    };
    Ok(u64::try_from(time.tv_sec)? * 1_000_000_000 + u64::try_from(time.tv_nsec)?)
}

/// Has the kernel note the first entry into a guest and no other event, and count exits to userspace by their reason (Documentation/trace/
/// events.rst, histogram.rst).
fn trace() -> Result<()> {
    let set = |path: String, text: &str| fs::write(&path, text).with_context(|| path);
    set(format!("{TRACE}/trace_clock"), "mono")?;
    set(format!("{EVENTS}/kvm_entry/trigger"), "traceoff:1")?;
    set(format!("{EVENTS}/kvm_entry/enable"), "1")?;
    set(format!("{EVENTS}/kvm_userspace_exit/trigger"), "hist:keys=reason")
}

/// When the guest was first entered: the trace's only event, whose line has seconds and microseconds before its name.
fn first_entry() -> Result<Option<u64>> {
    let text = fs::read_to_string(format!("{TRACE}/trace"))?;
    Ok(text.lines().find_map(entry_time))
}

fn entry_time(line: &str) -> Option<u64> {
    let (before, _) = line.split_once(": kvm_entry:")?;
    let (seconds, micros) = before.rsplit(' ').next()?.split_once('.')?;
    Some(seconds.parse::<u64>().ok()? * 1_000_000_000 + micros.parse::<u64>().ok()? * 1000)
}

/// KVM's counts of all machines that there are: one.
fn counts() -> Vec<(String, u64)> {
    let mut all = Vec::new();
    let machines = fs::read_dir(COUNTS).into_iter().flatten().flatten().map(|entry| entry.path());
    for machine in machines.filter(|path| path.is_dir()) {
        for file in fs::read_dir(machine).into_iter().flatten().flatten() {
            let count = fs::read_to_string(file.path()).ok().and_then(|text| text.trim().parse().ok());
            if let Some(count @ 1..) = count {
                all.push((file.file_name().to_string_lossy().into_owned(), count));
            }
        }
    }
    all.sort();
    all
}

/// Exits to userspace so far, by KVM's number of the reason.
fn histogram() -> Vec<(String, u64)> {
    reasons(&fs::read_to_string(format!("{EVENTS}/kvm_userspace_exit/hist")).unwrap_or_default())
}

/// Reads `{ reason:          2 } hitcount:         42`.
fn reasons(text: &str) -> Vec<(String, u64)> {
    let line = |line: &str| {
        let (reason, count) = line.strip_prefix("{ reason:")?.split_once("} hitcount:")?;
        Some((reason.trim().to_owned(), count.trim().parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

/// What Bantam's own statistics say: `REASON DEVICE` and the count, of all CPUs.
fn by_device(json: &str) -> Vec<(String, u64)> {
    let exits =
        json.split_once("\"by\"").map_or("", |(_, rest)| rest.split_once("\"time\"").map_or("", |parts| parts.0));
    let value = |text: &str, name: &str| {
        let (_, rest) = text.split_once(&format!("\"{name}\""))?;
        let rest = rest.trim_start_matches([':', ' ', '\n']);
        Some(rest.split([',', '}', '\n']).next()?.trim_matches('"').to_owned())
    };
    let mut all: Vec<(String, u64)> = Vec::new();
    for kind in exits.split("\"reason\"").skip(1) {
        let kind = format!("\"reason\"{kind}");
        let device = value(&kind, "device").filter(|device| device != "null").unwrap_or_else(|| "-".into());
        let (Some(reason), Some(count)) = (value(&kind, "reason"), value(&kind, "count")) else { continue };
        let (name, count) = (format!("{reason} {device}"), count.parse().unwrap_or(0));
        match all.iter_mut().find(|(known, _)| *known == name) {
            Some((_, sum)) => *sum += count,
            None => all.push((name, count)),
        }
    }
    all.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    all
}

/// Lets the monitor end, or ends it: some know no power-off.
fn end(child: &mut Child, mut out: impl Read + Send + 'static) -> Result<()> {
    std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
    let since = Instant::now();
    while child.try_wait()?.is_none() {
        if since.elapsed() > ENDING {
            child.kill()?;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A monitor with its words and its kernel's. `stats` is for Bantam to write its statistics to.
fn command(name: &str, own: &str, folder: &Path, stats: &Path) -> Result<Command> {
    let file = |name: &str| folder.join(name);
    let elf = file("vmlinux");
    let (image, initrd) = (file("vmlinuz"), file("initrd.img"));
    let best = if elf.exists() { elf } else { image.clone() };
    let pl011 = Arch::native() == Arch::Arm64 && name == "cloud-hypervisor";
    let cmdline = format!("console={} {own} panic=-1", if pl011 { "ttyAMA0" } else { "ttyS0" });
    let mut command = Command::new(file("monitor"));
    match name {
        "bantam" => {
            command.arg("run").arg(best).arg("--initrd").arg(initrd).args(["--memory", "256M", "--cmdline", own]);
            command.arg(format!("--stats={}", stats.display()));
        }
        "firecracker" => {
            let config = file("firecracker.json");
            fs::write(&config, firecracker(&best, &initrd, &cmdline))?;
            command.args(["--no-api", "--level", "Error", "--config-file"]).arg(config);
        }
        "cloud-hypervisor" => {
            command.arg("--kernel").arg(best).arg("--initramfs").arg(initrd).args(["--cmdline", &cmdline]);
            command.args(["--serial", "tty", "--console", "off", "--memory", "size=256M", "--cpus", "boot=1"]);
        }
        "kvmtool" => {
            command.args(["run", "--kernel"]).arg(image).arg("--initrd").arg(initrd).args(["--params", &cmdline]);
            command.args(["--mem", "256", "--cpus", "1", "--console", "serial"]);
        }
        super::FLOOR => {
            command.arg("add");
        }
        _ => {
            command.args([&best, &initrd, &PathBuf::from(cmdline)]);
        }
    }
    Ok(command)
}

/// Firecracker's words are a file.
fn firecracker(kernel: &Path, initrd: &Path, cmdline: &str) -> String {
    format!(
        r#"{{"boot-source":{{"kernel_image_path":"{}","initrd_path":"{}","boot_args":"{cmdline} reboot=k"}},"drives":[],
        "machine-config":{{"vcpu_count":1,"mem_size_mib":256}}}}"#,
        kernel.display(),
        initrd.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_traced_is_read() {
        let line = "          vcpu0-123     [000] d..1.    12.345678: kvm_entry: vcpu 0, rip 0x1000000";
        assert_eq!(entry_time(line), Some(12_345_678_000));
        assert_eq!(entry_time("# tracer: nop"), None);
        let text =
            "# event histogram\n{ reason:          2 } hitcount:         42\n{ reason: 6 } hitcount: 1\n\nTotals:\n";
        assert_eq!(reasons(text), [("2".into(), 42), ("6".into(), 1)]);
    }

    #[test]
    fn bantams_statistics_are_read_by_device() {
        let json = r#"{"exits":{"total":9,"by":[{"reason":"io-out","device":"serial","vcpu":0,"count":5,"latency_ns":{"p50":1}},
            {"reason":"io-out","device":"serial","vcpu":1,"count":3,"latency_ns":{"p50":1}},
            {"reason":"halt","device":null,"vcpu":0,"count":1,"latency_ns":{"p50":1}}]},"time":{"count":7}}"#;
        assert_eq!(by_device(json), [("io-out serial".into(), 8), ("halt -".into(), 1)]);
    }
}
