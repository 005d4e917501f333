#!/bin/sh
# Cargo calls this in place of rustc for the packages of this workspace. It links `bantam` (and the bench's floor)
# statically: such a program starts in half the time of a dynamic one and runs on any host. It cannot be a flag
# for all crates, since procedural macros must be dynamic libraries. What starts a machine lies side by side in it: see
# xtask/src/order.rs.
rustc=$1
shift
case " $* " in
*" --crate-name bantam "*" --crate-type bin "* | *" --crate-name floor "*" --crate-type bin "*)
    set -- "$@" -C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs ;;
esac
case " $* " in
*" --crate-name bantam "*" --crate-type bin "*) set -- "$@" -C "link-arg=-Wl,-T,${0%/*}/start.ld" ;;
esac
exec "$rustc" "$@"
