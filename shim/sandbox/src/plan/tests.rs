//! Snapshots of plans, and each refusal.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use oci_spec::runtime::{MountBuilder, Spec};

use super::{Plan, PlanError, Propagation, ShareTags, VmSize, Volume, VolumeShare, guest_memory_volume, plan, vm_size};

fn spec_with_bind(source: &str, options: &[&str]) -> Spec {
    let mount = MountBuilder::default()
        .destination("/mnt")
        .typ("bind")
        .source(source)
        .options(options.iter().map(ToString::to_string).collect::<Vec<_>>())
        .build()
        .expect("mount");
    let mut spec = Spec::default();
    spec.set_mounts(Some(vec![mount]));
    spec
}

fn volume(source: &str, read_only: bool, propagation: Propagation) -> Volume {
    Volume { source: PathBuf::from(source), read_only, propagation }
}

fn alone(spec: Spec) -> Result<Plan, PlanError> {
    plan(spec, &ShareTags::only(), &HashMap::new())
}

#[test]
fn a_volume_gets_a_guest_path() {
    let planned = alone(spec_with_bind("/srv/data", &["rbind", "ro"])).expect("plan");
    let data = volume("/srv/data", true, Propagation::Private);
    assert_eq!(planned.volumes, BTreeMap::from([(VolumeShare::Private, vec![data])]));
    let mounts = planned.spec.mounts().clone().expect("mounts");
    assert_eq!(mounts[0].source(), &Some(PathBuf::from("/run/share/volumes/v0")));
    assert_eq!(planned.spec.root().clone().expect("root").path(), &PathBuf::from("/run/share/rootfs"));
}

#[test]
fn volumes_that_later_mounts_come_to_have_shares_of_their_own() {
    let mut spec = spec_with_bind("/srv/data", &["rbind", "rprivate"]);
    for (source, options) in [("/disks", ["rbind", "rslave"]), ("/a", ["ro", "slave"]), ("/b", ["rslave", "rro"])] {
        let other = spec_with_bind(source, &options).mounts().clone().expect("mounts");
        spec.mounts_mut().as_mut().expect("mounts").extend(other);
    }
    let planned = alone(spec).expect("plan");
    let (disks, a) = (volume("/disks", false, Propagation::Slave), volume("/a", true, Propagation::Slave));
    let b = volume("/b", true, Propagation::Slave);
    let expected = [
        (VolumeShare::Private, vec![volume("/srv/data", false, Propagation::Private)]),
        (VolumeShare::Slave, vec![disks]),
        (VolumeShare::ReadOnlySlave, vec![a, b]),
    ];
    assert_eq!(planned.volumes, BTreeMap::from(expected));
    let mounts = planned.spec.mounts().clone().expect("mounts");
    let sources: Vec<_> = mounts.iter().map(|mount| mount.source().clone().expect("a source")).collect();
    let names = ["volumes/v0", "volumes-slave/v0", "volumes-slave-ro/v0", "volumes-slave-ro/v1"];
    assert_eq!(sources, names.map(|name| PathBuf::from("/run/share").join(name)));
}

#[test]
fn mounts_of_the_guest_do_not_come_to_the_host() {
    for option in ["shared", "rshared"] {
        let error = alone(spec_with_bind("/srv/data", &["rbind", option])).expect_err("refused");
        assert_eq!(error, PlanError::Shared { destination: PathBuf::from("/mnt") });
    }
    let mut spec = Spec::default();
    let of_kernel = MountBuilder::default().destination("/proc").typ("proc").options(vec!["rshared".to_owned()]);
    spec.set_mounts(Some(vec![of_kernel.build().expect("mount")]));
    alone(spec).expect("it is not a bind mount");
}

#[test]
fn other_mounts_stay_as_they_are() {
    let spec = Spec::default();
    let planned = alone(spec.clone()).expect("plan");
    assert!(planned.volumes.is_empty());
    assert_eq!(planned.spec.mounts(), spec.mounts());
}

#[test]
fn shared_memory_is_the_guests_unless_the_guest_has_a_volume_for_it() {
    let mut spec = spec_with_bind("/run/pod/shm", &["rbind", "rw"]);
    spec.mounts_mut().as_mut().expect("mounts")[0].set_destination("/dev/shm".into());
    let source = |in_guest| {
        let planned = plan(spec.clone(), &ShareTags::only(), &in_guest).expect("plan");
        assert!(planned.volumes.is_empty());
        planned.spec.mounts().clone().expect("mounts")[0].source().clone().expect("a source")
    };
    assert_eq!(source(HashMap::new()), PathBuf::from("/dev/shm"));
    let shm = volume("/run/pod/shm", false, Propagation::Private);
    assert_eq!(source(HashMap::from([(shm, guest_memory_volume("m0"))])), PathBuf::from("/run/share/m0"));
}

#[test]
fn kernel_interfaces_of_the_host_are_refused() {
    let error = alone(spec_with_bind("/proc/sys", &["bind"])).expect_err("refused");
    assert_eq!(error, PlanError::Forbidden { path: PathBuf::from("/proc/sys") });
}

#[test]
fn sizes_round_up_and_include_the_guest() {
    assert_eq!(vm_size(1.5, 128 << 20), Ok(VmSize { vcpus: 2, memory_mib: 224 }));
}

#[test]
fn absurd_sizes_are_refused() {
    assert_eq!(vm_size(0.0, 1 << 30), Err(PlanError::Cpus { asked: "0".to_owned() }));
    assert_eq!(vm_size(f64::NAN, 1 << 30), Err(PlanError::Cpus { asked: "NaN".to_owned() }));
    assert_eq!(vm_size(65.0, 1 << 30), Err(PlanError::Cpus { asked: "65".to_owned() }));
    assert!(matches!(vm_size(1.0, u64::MAX), Err(PlanError::Memory { .. })));
}
