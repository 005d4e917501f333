//! Why the processor itself gave up, by the names of its manual: what KVM passes on as a number in KVM_EXIT_FAIL_ENTRY,
//! KVM_EXIT_UNKNOWN and KVM_EXIT_INTERNAL_ERROR.

/// VT-x: the entry failed before the guest ran (Intel SDM vol. 3, appendix C: bit 31).
const VMX_ENTRY_FAILURE: u64 = 1 << 31;

/// Basic exit reasons of VT-x (Intel SDM vol. 3, appendix C, table C-1) that a guest may die of.
fn vmx(reason: u64) -> Option<&'static str> {
    Some(match reason & 0xffff {
        0 => "exception or NMI",
        1 => "external interrupt",
        2 => "triple fault",
        3 => "INIT signal",
        4 => "start-up IPI",
        9 => "task switch",
        10 => "CPUID",
        12 => "HLT",
        28 => "control-register access",
        29 => "debug-register access",
        30 => "I/O instruction",
        31 => "RDMSR",
        32 => "WRMSR",
        33 => "invalid guest state",
        34 => "MSR loading",
        41 => "machine check during entry",
        43 => "TPR below threshold",
        44 => "APIC access",
        46 => "access to GDTR or IDTR",
        47 => "access to LDTR or TR",
        48 => "EPT violation",
        49 => "EPT misconfiguration",
        54 => "WBINVD",
        55 => "XSETBV",
        56 => "APIC write",
        75 => "notify",
        _ => return None,
    })
}

/// SVM's exit codes (AMD APM vol. 2, appendix C).
fn svm(code: u64) -> Option<String> {
    Some(match code {
        u64::MAX => "VMEXIT_INVALID: invalid guest state in the VMCB".into(),
        0x40..=0x5f => format!("VMEXIT_EXCP{0}: exception {0}", code - 0x40),
        0x61 => "VMEXIT_NMI".into(),
        0x72 => "VMEXIT_CPUID".into(),
        0x78 => "VMEXIT_HLT".into(),
        0x7b => "VMEXIT_IOIO".into(),
        0x7c => "VMEXIT_MSR".into(),
        0x7f => "VMEXIT_SHUTDOWN: triple fault".into(),
        0x80 => "VMEXIT_VMRUN".into(),
        0x400 => "VMEXIT_NPF: nested page fault".into(),
        _ => return None,
    })
}

/// The name of `hardware_entry_failure_reason`: VT-x's reasons have bit 31 set and 32 bits, SVM's is -1. Without the bit
/// it is the error number of a failed VMLAUNCH or VMRESUME (SDM vol. 3, "VM Instruction Error Numbers").
pub fn entry_failure(reason: u64) -> String {
    if reason >> 32 == 0 && reason & VMX_ENTRY_FAILURE != 0 {
        return format!("VT-x: {}", vmx(reason).unwrap_or("a reason without a name"));
    }
    match reason {
        u64::MAX => format!("SVM: {}", svm(reason).unwrap_or_default()),
        7 => "VT-x: VM entry with invalid control fields".into(),
        8 => "VT-x: VM entry with invalid host-state fields".into(),
        _ => "a reason without a name".into(),
    }
}

/// The name of an exit reason that KVM did not expect. The number alone does not say whose it is.
pub fn exit(reason: u64) -> String {
    match (vmx(reason).filter(|_| reason < 0x1_0000), svm(reason)) {
        (Some(vmx), Some(svm)) => format!("VT-x: {vmx}, or SVM: {svm}"),
        (Some(vmx), None) => format!("VT-x: {vmx}"),
        (None, Some(svm)) => format!("SVM: {svm}"),
        (None, None) => entry_failure(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_have_their_names() {
        assert_eq!(entry_failure(0x8000_0021), "VT-x: invalid guest state");
        assert_eq!(entry_failure(0x8000_0022), "VT-x: MSR loading");
        assert!(entry_failure(u64::MAX).contains("SVM: VMEXIT_INVALID"));
        assert!(entry_failure(7).contains("control fields") && entry_failure(99).contains("without a name"));
        assert_eq!(exit(48), "VT-x: EPT violation");
        assert_eq!(exit(0x400), "SVM: VMEXIT_NPF: nested page fault");
        assert!(exit(0x4d).contains("exception 13") && exit(0x8000_0021).contains("invalid guest state"));
        assert!(exit(12345).contains("without a name"));
    }
}
