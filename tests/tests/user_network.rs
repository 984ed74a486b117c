//! `vmrun run` with a network of the command line, in a host network of the story's own.

use tests::Story;
use tests::lan::{Attachment, Lan, ip, ptp};

#[test]
fn a_namespace_that_a_plugin_has_wired_is_the_network_of_a_container() {
    let story = Story::new();
    let lan = Lan::enter();
    let netns = lan.netns();
    let attachment = Attachment::add(&netns, "eth0", vec![ptp(&story.volume(), 1500)]);
    let network = format!("netns:{}", netns.path().display());
    let script = "ip -4 addr show eth0 | grep inet; ip route; ping -c 1 -W 30 10.88.0.1";
    let done = story.run(&["--network", &network, "--cap-add", "NET_RAW"], &["sh", "-c", script]);
    assert!(done.success().contains(&attachment.address('.')), "{done:?}");
    assert!(done.stdout.contains("default via 10.88.0.1"), "{done:?}");
    assert_eq!(netns.redirections(), "");
    assert!(!ip(&format!("-n {} link show", netns.name())).contains("vmtap"));
}
