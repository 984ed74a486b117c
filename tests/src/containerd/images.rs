//! Images of the stories, imported with `ctr images import`.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::{BUSYBOX, Containerd, PAUSE};
use crate::image::{Image, Layer, pack};
use crate::outcome;

/// The namespace of the CRI plugin.
const CRI_NAMESPACE: &str = "k8s.io";

impl Containerd {
    /// Returns the chain id of the image's layers.
    pub(super) fn import_busybox(&self) -> String {
        let busybox = busybox_image();
        self.import(&busybox, BUSYBOX, &[&self.namespace(), CRI_NAMESPACE]);
        let pause = self::busybox(json!({"Entrypoint": ["/bin/sleep", "1000000"]}));
        self.import(&pause, PAUSE, &[CRI_NAMESPACE]);
        // OCI image-spec, config.md: the chain id of one layer is its diff id.
        busybox.diff_ids().remove(0)
    }

    /// Imports the image of busybox by another name, into the namespace that `ctr` has by default.
    pub fn import_as(&self, name: &str) {
        self.import(&busybox_image(), name, &["default"]);
    }

    fn import(&self, image: &Image, name: &str, namespaces: &[&str]) {
        let layout = self.path("layout");
        let tag = name.rsplit_once(':').expect("a tag").1;
        image.write_layout(&layout, tag);
        for namespace in namespaces {
            self.import_layout(&layout, name, namespace);
        }
        fs::remove_dir_all(layout).expect("removed");
    }

    fn import_layout(&self, layout: &Path, name: &str, namespace: &str) {
        let archive = self.path("image.tar");
        pack(layout, &archive);
        let base_name = name.rsplit_once(':').expect("a tag").0;
        let archive_name = archive.to_str().expect("a path of ours");
        let import = ["images", "import", "--base-name", base_name, archive_name];
        let _ = outcome(self.ctr_in(namespace, &import)).success();
        fs::remove_file(archive).expect("removed");
    }
}

/// The image that [`BUSYBOX`] names.
pub(crate) fn busybox_image() -> Image {
    busybox(json!({"Cmd": ["sh"], "Env": ["PATH=/bin"]}))
}

fn busybox(config: Value) -> Image {
    let users = b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n";
    let layer = Layer::busybox().dir("root", 0o700).file("etc/passwd", users, 0o644);
    Image::new(vec![layer.file("etc/group", b"root:x:0:\n", 0o644)], config)
}
