//! What a snapshot keeps of a configuration.

use super::Config;

/// What only matters when a machine begins.
const OF_THE_BEGINNING: [&str; 6] = ["initrd", "reg", "load-at", "entry", "cmdline", "cmdline-raw"];
/// What a machine may have another of once it is restored: how it is connected, looked at and ended, not what it is.
const NOT_OF_A_SNAPSHOT: [&str; 18] = [
    "name",
    "serial",
    "until",
    "timeout",
    "stop-timeout",
    "max-exits",
    "reboot",
    "explain",
    "core",
    "trace",
    "trace-filter",
    "trace-memory",
    "trace-insn",
    "symbols",
    "last-exits",
    "stats",
    "stats-interval",
    "watchdog",
];

impl Config {
    /// What a snapshot keeps of it: the machine, and not how it is looked at.
    #[must_use]
    pub fn of_a_snapshot(&self) -> Self {
        let mut all = self.without(&NOT_OF_A_SNAPSHOT);
        OF_THE_BEGINNING.iter().for_each(|name| drop(all.remove(*name)));
        // What is missing has its default, and the rest was just written.
        serde_json::from_value(all.into()).unwrap_or_default()
    }

    /// The first option that makes this another machine than that of a snapshot.
    pub fn differs_from(&self, snapshot: &Self) -> Option<String> {
        let (own, others) = (self.without(&NOT_OF_A_SNAPSHOT), snapshot.without(&NOT_OF_A_SNAPSHOT));
        own.into_iter().find(|(name, value)| others.get(name) != Some(value)).map(|(name, _)| name)
    }

    fn without(&self, names: &[&str]) -> serde_json::Map<String, serde_json::Value> {
        let mut fields = match serde_json::to_value(self) {
            Ok(serde_json::Value::Object(fields)) => fields,
            _ => serde_json::Map::new(),
        };
        names.iter().for_each(|name| drop(fields.remove(*name)));
        fields
    }
}
