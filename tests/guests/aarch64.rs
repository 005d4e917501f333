//! Exception levels, device tree, PSCI, sleeping.

use super::{example, test_guest};
use crate::common::{arch, bantam, code, kvm, run_bytes, within};

#[test]
fn the_guest_sees_its_cpu() {
    if !kvm() {
        return;
    }
    let out = example("cpuid", "").run().expect(0).out();
    assert!(out.starts_with("MIDR_EL1: 0x00000000") && out.contains("\naddress bits: "), "{out}");
}

#[test]
fn the_device_tree_tells_the_guest_what_is_there() {
    if !kvm() {
        return;
    }
    let tree =
        |memory: &str, cpus: u32| format!("magic right\nmachine: linux,dummy-virt\nmemory: 0x{memory}\nCPUs: {cpus}\n");
    example("fdt", "--memory 64M").run().expect(0).printed(&tree("0000000040000000 + 0x0000000004000000", 1));
    example("fdt", "--memory 5G --cpus 3").run().expect(0).printed(&tree("0000000040000000 + 0x0000000140000000", 3));
    let words = "--memory 64K --ram-base 0x80000000 --cpus 20 --fdt-at 0x80002000";
    example("fdt", words).run().expect(0).printed(&tree("0000000080000000 + 0x0000000000010000", 20));
    for gic in ["", "--gic 3", "--irqchip none"] {
        let out = example("fdt", gic).run().expect(0).out();
        assert!(out.starts_with("magic right\n"), "{gic}: {out}");
    }
}

#[test]
fn a_tree_that_has_no_room_is_not_there() {
    if !kvm() {
        return;
    }
    // As large as a page of RAM leaves no room for.
    let guest = guests::find("fdt").unwrap();
    let mut image = (guest.image)().to_vec();
    image.resize(3500, 0);
    run_bytes(&image, "--memory 4K").expect(0).printed("no device tree\n");
}

#[test]
fn the_device_tree_is_written_to_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tree");
    bantam(&format!("layout --memory 64M --fdt {}", path.display())).run().expect(0);
    let tree = std::fs::read(&path).unwrap();
    assert_eq!(tree[..4], 0xd00d_feed_u32.to_be_bytes());
    assert_eq!(tree.len(), u32::from_be_bytes(tree[4..8].try_into().unwrap()) as usize);
}

#[test]
fn psci_refuses_what_it_must() {
    if !kvm() {
        return;
    }
    test_guest("psci", "").expect(1);
}

#[test]
fn cache_maintenance_needs_no_memory() {
    if !kvm() {
        return;
    }
    test_guest("cache-hole", "").expect(1);
}

#[test]
fn a_sleeping_machine_ends_unless_something_can_wake_it() {
    if !kvm() {
        return;
    }
    let outcome = run_bytes(code::SILENT_TIMER, "--timeout 5");
    outcome.expect(0);
    assert!(outcome.took < within(2.0), "{:?}", outcome.took);
    run_bytes(code::TIMER, "--timeout 2.5").expect(124);
    // A CPU that sleeps and one that does not.
    test_guest("smp-spin", "--timeout 2.5").expect(124);
}

#[test]
fn a_guest_lost_in_its_own_exceptions_dies() {
    if !kvm() {
        return;
    }
    test_guest("abort-storm", "--timeout 20").expect(126).said("the guest died").said("0x200");
}

#[test]
fn every_cpu_has_its_own_affinity() {
    if !kvm() {
        return;
    }
    let outcome = example("smp", "--cpus 35").run();
    let all: String = (0..35).map(|n| format!("CPU {n}\n")).collect();
    outcome.expect(0).printed(&all);
}

#[test]
fn the_entry_state_is_as_documented() {
    if !kvm() {
        return;
    }
    // x0, sp, CurrentEL, DAIF.
    let state = |words: &str| {
        let trace = run_bytes(code::STATE, &format!("{words} --trace")).expect(0).trace();
        let number = |l: &String| u64::from_str_radix(l.split("0x").nth(2)?.split(' ').next()?, 16).ok();
        trace.iter().filter_map(number).collect::<Vec<_>>()
    };
    // The device tree is at the end of RAM, the stack below it.
    let words = "--memory 16M";
    let [tree, stack, level, masks] = state(words)[..] else { panic!("{:?}", state(words)) };
    assert!((0x40ff_0000..0x4100_0000).contains(&tree), "{tree:#x}");
    assert_eq!((stack, level, masks), (tree, 4, 0x3c0));
    assert_eq!(state("--memory 16M --reg sp=0x40001000 --reg x0=7")[..2], [7, 0x4000_1000]);
    assert_eq!(state("--memory 16M --fdt-at 0x40001000")[..2], [0x4000_1000, 0x4100_0000]);
    let words = "--memory 16M --ram-base 0x80000000 --load-at 0x80001000 --entry 0x80001000 --fdt-at 0x80002000";
    assert_eq!(state(words)[..2], [0x8000_2000, 0x8100_0000]);
}

#[test]
fn the_debug_console_is_where_it_is_asked_for() {
    if !kvm() {
        return;
    }
    let at = |address: &str| format!("--reg x1={address}");
    run_bytes(code::STORE, &format!("--debugcon mmio:0x996 {}", at("0x996"))).expect(0).printed("m").said_nothing();
    let missed = "no device answers: 1, the first: write 0x0996";
    run_bytes(code::STORE, &at("0x996")).expect(0).printed("").said(missed);
    let words = format!("--debugcon mmio:0x30000000 --serial none --until m {}", at("0x30000000"));
    run_bytes(code::STORE, &words).expect(0).printed("m");
}

#[test]
fn a_gic_that_the_host_lacks_is_refused() {
    if !kvm() {
        return;
    }
    for gic in ["2", "3"] {
        let outcome = example("timer", &format!("--gic {gic}")).run();
        match outcome.status {
            7 => outcome.printed("tick\ntick\ntick\n"),
            _ => outcome.refused(125).said(&format!("no GICv{gic}")).said("--gic"),
        };
    }
}

#[test]
fn ram_that_addresses_cannot_reach_is_refused() {
    if !kvm() {
        return;
    }
    let outcome = run_bytes(code::HALT, "--memory 4K --ram-base 0x7ffffffff000");
    if outcome.status != 0 {
        outcome.refused(125).said("47 bits").said("this host's KVM has").said("--memory");
    }
    run_bytes(code::TOUCH, &format!("--memory 4K --ram-base 0x8000000000 --reg {}=0x8000000100", arch::POINTER))
        .expect(11);
}
