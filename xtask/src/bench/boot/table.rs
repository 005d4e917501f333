//! What the measurements of a boot come to, side by side.
//!
//! Invariant: a figure that was not measured is a dash, never a zero.

use std::collections::BTreeSet;

/// One boot.
#[derive(Debug, Default, PartialEq)]
pub struct Result {
    /// Nanoseconds from the start of the process: `entry`, `init`.
    times: Vec<(String, u64)>,
    /// Exits to userspace that a line of init's costs by itself.
    line: Option<u64>,
    /// KVM's own counts up to the guest's init.
    kvm: Vec<(String, u64)>,
    /// Exits to userspace up to there, by KVM's number of the reason.
    user: Vec<(String, u64)>,
    /// Bantam's own counts, of the whole life of the guest.
    device: Vec<(String, u64)>,
}

impl Result {
    /// Reads what the inside prints.
    pub fn parse(text: &str) -> Self {
        let mut result = Self::default();
        for line in text.lines() {
            let words: Vec<_> = line.splitn(3, ' ').collect();
            match *words.as_slice() {
                [time @ ("entry" | "init"), count] => push(&mut result.times, time, count),
                ["line", count] => result.line = count.parse().ok(),
                ["kvm", name, count] => push(&mut result.kvm, name, count),
                ["user", reason, count] => push(&mut result.user, reason, count),
                ["device", count, name] => push(&mut result.device, name, count),
                _ => {}
            }
        }
        result
    }

    fn time(&self, name: &str) -> Option<u64> {
        self.times.iter().find(|(known, _)| known == name).map(|(_, time)| *time)
    }

    /// All exits to userspace.
    fn to_userspace(&self) -> Option<u64> {
        (!self.user.is_empty()).then(|| self.user.iter().map(|(_, count)| count).sum())
    }
}

fn push(to: &mut Vec<(String, u64)>, name: &str, count: &str) {
    if let Ok(count) = count.trim().parse() {
        to.push((name.into(), count));
    }
}

/// KVM's counts that are no exits or other events, but states and sizes.
const NO_EVENTS: [&str; 7] = [
    "pages_4k",
    "pages_2m",
    "pages_1g",
    "mmu_cache_miss",
    "max_mmu_page_hash_collisions",
    "nx_lpage_splits",
    "tlb_flush",
];

/// KVM_EXIT_… of the API (linux/kvm.h).
fn reason(number: &str) -> String {
    let known = match number {
        "2" => "port I/O",
        "5" => "halt",
        "6" => "MMIO",
        "7" => "interrupt window",
        "8" => "shutdown",
        "10" => "a signal",
        "24" => "system event",
        "26" => "end of interrupt",
        _ => return format!("reason {number}"),
    };
    known.into()
}

/// The table, and below it where Bantam's exits to userspace went.
pub fn table(columns: &[(String, Vec<Result>)]) -> String {
    let names: Vec<_> = columns.iter().map(|(name, _)| name.as_str()).collect();
    let mut text = format!("| | {} |\n|---{}|\n", names.join(" | "), "|---".repeat(names.len()));
    let mut line = |name: &str, cell: &dyn Fn(&[Result]) -> String| {
        let cells: Vec<_> = columns.iter().map(|(_, results)| cell(results)).collect();
        text += &format!("| {name} | {} |\n", cells.join(" | "));
    };
    line("start → first guest instruction, ms", &|results| times(results, |result| result.time("entry")));
    line("start → init, ms", &|results| times(results, |result| result.time("init")));
    line("exits to userspace up to init", &|results| count(results.first().and_then(Result::to_userspace)));
    line("of them for init's own line", &|results| count(results.first().and_then(|result| result.line)));
    for (what, of) in [("of them ", (|result| &result.user) as fn(&Result) -> &Vec<_>), ("KVM: ", |result| &result.kvm)]
    {
        let all = columns.iter().flat_map(|(_, results)| results.first()).flat_map(of);
        let keys: BTreeSet<_> = all.map(|(name, _)| name).filter(|name| !NO_EVENTS.contains(&name.as_str())).collect();
        for key in keys {
            let name = if what == "KVM: " { format!("{what}{key}") } else { format!("{what}{}", reason(key)) };
            let found = |result: &Result| of(result).iter().find(|(name, _)| name == key).map(|(_, count)| *count);
            line(&name, &|results| count(results.first().and_then(found)));
        }
    }
    for (name, results) in columns {
        let Some(result) = results.first().filter(|result| !result.device.is_empty()) else { continue };
        text += &format!("\n{name}'s exits to userspace by device, init's line and the power-off included:\n\n");
        text += "| exits | reason | device |\n|---|---|---|\n";
        for (kind, count) in &result.device {
            text += &format!("| {count} | {} |\n", kind.replacen(' ', " | ", 1));
        }
    }
    text
}

fn count(count: Option<u64>) -> String {
    count.map_or_else(|| "—".into(), |count| count.to_string())
}

/// The least and the most of all runs, in milliseconds.
fn times(results: &[Result], of: impl Fn(&Result) -> Option<u64>) -> String {
    let times: Vec<_> = results.iter().filter_map(of).map(|time| time as f64 / 1e6).collect();
    let (least, most) = times.iter().fold((f64::MAX, 0.0), |(a, b), time| (time.min(a), time.max(b)));
    match times.len() {
        0 => "—".into(),
        1 => format!("{least:.2}"),
        _ => format!("{least:.2} – {most:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_put_beside_each_other() {
        let ours = "init 1100000000\nentry 900000\nkvm exits 70\nkvm pages_4k 9\nuser 2 30\nuser 6 4\nline 7\ndevice 30 io-out serial\n";
        let theirs = "init 1200000000\nkvm exits 80\nuser 2 35\n";
        let columns = [("bantam", ours), ("other", theirs)].map(|(name, text)| {
            let result = Result::parse(text);
            (name.to_owned(), vec![result])
        });
        let text = table(&columns);
        for line in [
            "| | bantam | other |",
            "| start → first guest instruction, ms | 0.90 | — |",
            "| start → init, ms | 1100.00 | 1200.00 |",
            "| exits to userspace up to init | 34 | 35 |",
            "| of them for init's own line | 7 | — |",
            "| of them port I/O | 30 | 35 |",
            "| of them MMIO | 4 | — |",
            "| KVM: exits | 70 | 80 |",
            "| 30 | io-out | serial |",
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line:?} is not in:\n{text}");
        }
        assert!(!text.contains("pages_4k"), "{text}");
    }
}
