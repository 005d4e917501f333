//! What the host's kernel says of this process: memory and page faults.

use serde::Serialize;

/// Memory in KiB, faults since the start.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// In RAM, all together.
    pub rss_kib: u64,
    /// Of it the monitor's: program, heap, stacks.
    pub monitor_kib: u64,
    /// Of it guest RAM that the guest has touched.
    pub guest_kib: u64,
    /// Page faults that needed no disk, those of the guest included.
    pub minor_faults: u64,
    /// Page faults that did.
    pub major_faults: u64,
}

/// Reads the process's own figures; what cannot be read is 0.
pub fn memory() -> Memory {
    let text = |name: &str| std::fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
    parse(&text("status"), &text("stat"))
}

fn parse(status: &str, stat: &str) -> Memory {
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    };
    // The second field is the program's name, which may hold anything; fields are counted from behind it.
    let field = |number: usize| {
        let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        rest.split(' ').nth(number - 3).and_then(|word| word.parse().ok()).unwrap_or(0)
    };
    Memory {
        rss_kib: kib("VmRSS"),
        monitor_kib: kib("RssAnon") + kib("RssFile"),
        guest_kib: kib("RssShmem"),
        minor_faults: field(10),
        major_faults: field(12),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_whatever_the_program_is_called() {
        let status = "Name:\tx\nVmRSS:\t  100 kB\nRssAnon:\t   20 kB\nRssFile:\t   30 kB\nRssShmem:\t   50 kB\n";
        let stat = "7 (a) R 1) S 1 7 7 0 -1 4194304 123 0 4 0 1 2";
        let memory = Memory { rss_kib: 100, monitor_kib: 50, guest_kib: 50, minor_faults: 123, major_faults: 4 };
        assert_eq!(parse(status, stat), memory);
        assert_eq!(parse("", ""), Memory::default());
        assert!(super::memory().rss_kib > 0);
    }
}
