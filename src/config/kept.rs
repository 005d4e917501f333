//! What a snapshot keeps of a configuration, and what a machine that goes on from there may have another of.

use super::{Config, Words};
use crate::error::{Refusal, usage};

/// What only matters when a machine begins.
const OF_THE_BEGINNING: [&str; 6] = ["initrd", "reg", "load-at", "entry", "cmdline", "cmdline-raw"];
/// What a machine may have another of once it is restored: how it is looked at and ended, not what it is.
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
/// What it is connected to: as many of the same kind, [`Config::connect`] sees to that.
const CONNECTED: [&str; 3] = ["disk", "net", "vsock"];

impl Config {
    /// What a snapshot keeps of it: the machine, and not how it is looked at.
    #[must_use]
    pub fn of_a_snapshot(&self) -> Self {
        let mut all = self.without(&NOT_OF_A_SNAPSHOT);
        OF_THE_BEGINNING.iter().for_each(|name| drop(all.remove(*name)));
        // What is missing has its default, and the rest was just written.
        let mut kept: Self = serde_json::from_value(all.into()).unwrap_or_default();
        kept.name_whole_paths_of_disks();
        kept
    }

    /// The first option that makes this another machine than that of a snapshot.
    pub fn differs_from(&self, snapshot: &Self) -> Option<String> {
        let of = |config: &Self| {
            let mut all = config.without(&NOT_OF_A_SNAPSHOT);
            CONNECTED.iter().for_each(|name| drop(all.remove(*name)));
            all
        };
        let (own, others) = (of(self), of(snapshot));
        own.into_iter().find(|(name, value)| others.get(name) != Some(value)).map(|(name, _)| name)
    }

    /// Connects a machine that goes on with what it is asked to: `--disk OLD=NEW`, as many `--net` as it had, `--vsock path=`.
    ///
    /// # Errors
    /// It had no such thing.
    pub fn connect(&mut self, snapshot: &Self) -> Result<(), Refusal> {
        self.connect_disks(snapshot)?;
        if self.net.len() != snapshot.net.len() {
            let (had, asked) = (snapshot.net.len(), self.net.len());
            return Err(usage(format!("--net: the machine had {had} of them, and {asked} are named")));
        }
        self.vsock = match (self.vsock.take(), &snapshot.vsock) {
            (Some(asked), None) => return Err(usage(format!("--vsock {asked}: the machine had none"))),
            (Some(asked), Some(had)) => {
                let named = asked.take("--vsock").without_first().value::<u32>("cid")?.is_some();
                let cid = had.take("--vsock").without_first().value::<u32>("cid")?.filter(|_| !named);
                Some(cid.map_or(asked.clone(), |cid| Words::join(&format!("cid={cid}"), &format!(",{asked}"))))
            }
            (None, had) => had.clone(),
        };
        Ok(())
    }

    /// The configuration of one of several machines: in every option `{}` is its number.
    #[must_use]
    pub fn numbered(&self, number: u32) -> Self {
        fn fill(value: &mut serde_json::Value, number: &str) {
            match value {
                serde_json::Value::String(text) => *text = text.replace("{}", number),
                serde_json::Value::Array(all) => all.iter_mut().for_each(|value| fill(value, number)),
                serde_json::Value::Object(all) => all.values_mut().for_each(|value| fill(value, number)),
                _ => {}
            }
        }
        let mut all = serde_json::to_value(self).unwrap_or_default();
        fill(&mut all, &number.to_string());
        // It was just written, and a number is no more than the letters that it stands for.
        serde_json::from_value(all).unwrap_or_else(|_| self.clone())
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn words(text: &str) -> Words {
        text.parse().unwrap()
    }

    fn had() -> Config {
        Config {
            disk: vec![words("/a=b.img,queues=2"), words("/c,,d.img,ro")],
            net: vec![words("tap:t0")],
            vsock: Some(words("cid=3,path=/v")),
            ..Config::default()
        }
    }

    fn asked(disk: &[&str], net: &[&str], vsock: Option<&str>) -> Result<Config, Refusal> {
        let mut config = had();
        if !disk.is_empty() {
            config.disk = disk.iter().map(|text| words(text)).collect();
        }
        if !net.is_empty() {
            config.net = net.iter().map(|text| words(text)).collect();
        }
        config.vsock = vsock.map(words);
        config.connect(&had()).map(|()| config)
    }

    #[test]
    fn a_machine_is_connected_with_what_it_had_or_with_what_it_is_asked_to() {
        assert_eq!(asked(&[], &[], None).unwrap(), had());
        let other = asked(&["/c,,d.img=/e,,f.img"], &["user,mtu=1400"], Some("path=/w")).unwrap();
        assert_eq!(other.disk, [words("/a=b.img,queues=2"), words("/e,,f.img,ro")]);
        assert_eq!((other.net, other.vsock), (vec![words("user,mtu=1400")], Some(words("cid=3,path=/w"))));
        let other = asked(&["/a=b.img=x=y.img,overlay"], &[], Some("cid=5,path=/w")).unwrap();
        assert_eq!((&other.disk[0], other.vsock), (&words("x=y.img,overlay"), Some(words("cid=5,path=/w"))));
        assert_eq!(other.disk.len(), 2);
    }

    #[test]
    fn what_it_never_had_is_refused() {
        for (disk, net, vsock) in [
            (&["/x=/y"][..], &[][..], None),
            (&["/y"], &[], None),
            (&[], &["tap:a", "tap:b"], None),
            (&[], &[], Some("cid=x")),
        ] {
            assert_eq!(asked(disk, net, vsock).unwrap_err().status, 2);
        }
        let mut none = Config { vsock: Some(words("path=/v")), ..Config::default() };
        assert!(none.connect(&Config::default()).unwrap_err().to_string().contains("the machine had none"));
    }

    #[test]
    fn a_machine_of_several_has_its_number_in_its_options() {
        let all = Config {
            name: Some("web-{}".into()),
            serial: "file:/tmp/{}.out".parse().unwrap(),
            net: vec![words("tap:t{}")],
            memory: crate::config::Size(5 << 20),
            ..had()
        };
        let seventh = all.numbered(7);
        assert_eq!(seventh.name.as_deref(), Some("web-7"));
        assert_eq!((seventh.serial, &seventh.net[0]), ("file:/tmp/7.out".parse().unwrap(), &words("tap:t7")));
        assert_eq!((seventh.memory, seventh.disk), (all.memory, all.disk));
    }

    #[test]
    fn a_snapshot_knows_where_its_disks_are_wherever_one_stands() {
        let config = Config { disk: vec![words("a,,b.img,ro")], name: Some("x".into()), ..Config::default() };
        let kept = config.of_a_snapshot();
        let (path, rest) = kept.disk[0].split();
        assert!(Path::new(&path).is_absolute() && path.ends_with("/a,b.img") && rest == ",ro", "{path} {rest}");
        assert_eq!(kept.name, None);
        assert_eq!(config.differs_from(&kept), None);
        let other = Config { memory: crate::config::Size(1 << 20), ..config };
        assert_eq!(other.differs_from(&kept).as_deref(), Some("memory"));
    }
}
