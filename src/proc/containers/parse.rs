//! The texts of the files that name containers. Pure.
//!
//! Sources: moby, container/container.go (config.v2.json); containers/storage, containers.go (containers.json) and containers/podman,
//! libpod/storage.go (its metadata); the OCI runtime specification (config.json); containerd, internal/cri/annotations; CRI-O,
//! internal/annotations; nerdctl, pkg/labels; the kubelet, pkg/kubelet/kuberuntime/legacy.go and helpers.go (names of logs).

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

/// The longest value that is taken for a name. Authors of containers can write longer ones into labels.
const MAX_VALUE: usize = 1024;

/// The shortest part of an id at the end of a cut log name that counts.
const MIN_CUT_ID: usize = 8;

/// What the files of a runtime say about a container. What they do not say is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    pub name: Option<String>,
    pub image: Option<String>,
    pub pod: Option<String>,
    pub namespace: Option<String>,
    pub pod_uid: Option<String>,
    pub compose_service: Option<String>,
    /// Whether what is `None` does not exist.
    pub is_complete: bool,
}

impl Entry {
    /// From labels or annotations, whoever wrote them.
    fn from_labels(labels: &HashMap<String, Value>) -> Entry {
        let first = |keys: &[&str]| {
            let mut values = keys.iter().filter_map(|key| labels.get(*key)?.as_str());
            values.find_map(value)
        };
        let is_sandbox = [
            "io.kubernetes.cri.container-type",
            "io.kubernetes.cri-o.ContainerType",
        ]
        .iter()
        .any(|key| labels.get(*key).and_then(Value::as_str) == Some("sandbox"));
        let name = first(&[
            "io.kubernetes.cri.container-name",
            "io.kubernetes.container.name",
            "nerdctl/name",
        ]);
        Entry {
            // The container that keeps the namespaces of a pod. containerd gives it no name, the others this one.
            name: name.or_else(|| is_sandbox.then(|| "POD".to_owned())),
            image: first(&[
                "io.kubernetes.cri.image-name",
                "io.kubernetes.cri-o.ImageName",
                "io.kubernetes.cri-o.Image",
            ]),
            pod: first(&["io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name"]),
            namespace: first(&[
                "io.kubernetes.cri.sandbox-namespace",
                "io.kubernetes.pod.namespace",
            ]),
            pod_uid: first(&["io.kubernetes.cri.sandbox-uid", "io.kubernetes.pod.uid"]),
            compose_service: first(&["com.docker.compose.service", "io.podman.compose.service"]),
            is_complete: false,
        }
    }
}

/// `text` as a value, if it can be one.
fn value(text: &str) -> Option<String> {
    (!text.is_empty() && text.len() <= MAX_VALUE).then(|| text.to_owned())
}

/// Docker's config.v2.json of the container `id`.
///
/// # Errors
/// It is not such a file, or is about another container.
pub(super) fn docker(text: &[u8], id: &str) -> Result<Entry, String> {
    #[derive(Deserialize)]
    struct File {
        #[serde(rename = "ID")]
        id: String,
        #[serde(rename = "Name", default)]
        name: String,
        #[serde(rename = "Config")]
        config: Option<Config>,
    }
    #[derive(Deserialize)]
    struct Config {
        #[serde(rename = "Image")]
        image: Option<String>,
        #[serde(rename = "Labels")]
        labels: Option<HashMap<String, Value>>,
    }
    let file: File = json(text)?;
    if file.id != id {
        return Err("it is about another container".to_owned());
    }
    let (image, labels) = match file.config {
        Some(config) => (config.image, config.labels.unwrap_or_default()),
        None => Default::default(),
    };
    // Docker puts a slash before the name.
    let own = value(file.name.strip_prefix('/').unwrap_or(&file.name));
    // The kubelet composes a name of parts that its labels have too. Labels of an image are among those of its containers, so under
    // another name these labels are not the kubelet's.
    let of_labels = Entry::from_labels(&labels);
    let of_labels = match own.as_deref().and_then(kubelet_name) {
        Some(_) => of_labels,
        None => Entry {
            compose_service: of_labels.compose_service,
            ..Entry::default()
        },
    };
    Ok(Entry {
        name: of_labels.name.or(own),
        image: image.as_deref().and_then(value),
        is_complete: true,
        ..of_labels
    })
}

/// The `containers.json` of containers/storage, by id.
///
/// # Errors
/// It is not such a file.
pub(super) fn storage(text: &[u8]) -> Result<HashMap<String, Entry>, String> {
    #[derive(Deserialize)]
    struct Row {
        id: String,
        #[serde(default)]
        names: Option<Vec<String>>,
        #[serde(default)]
        metadata: Option<String>,
    }
    /// Podman and CRI-O write it as a text of JSON.
    #[derive(Default, Deserialize)]
    struct Metadata {
        #[serde(rename = "image-name")]
        image: Option<String>,
        #[serde(rename = "pod-name")]
        pod: Option<String>,
        #[serde(rename = "container-name", alias = "name")]
        name: Option<String>,
    }
    let rows: Vec<Row> = json(text)?;
    let entry = |row: Row| {
        let metadata = row.metadata.unwrap_or_default();
        let metadata: Metadata = serde_json::from_str(&metadata).unwrap_or_default();
        let first = row.names.unwrap_or_default().into_iter().next();
        // Podman has no pod here, and lets people choose such a name.
        let of_kubelet = first.as_deref().filter(|_| metadata.pod.is_some());
        let of_kubelet = of_kubelet.and_then(kubelet_name);
        let entry = Entry {
            name: first.or(metadata.name).as_deref().and_then(value),
            image: metadata.image.as_deref().and_then(value),
            pod: metadata.pod.as_deref().and_then(value),
            is_complete: true,
            ..Entry::default()
        };
        let entry = match of_kubelet {
            Some(of_kubelet) => Entry {
                image: entry.image,
                ..of_kubelet
            },
            None => entry,
        };
        (row.id, entry)
    };
    Ok(rows.into_iter().map(entry).collect())
}

/// The parts of a name that CRI-O composes: `k8s_CONTAINER_POD_NAMESPACE_UID_ATTEMPT`. None of the parts has a `_`.
fn kubelet_name(name: &str) -> Option<Entry> {
    let parts: Vec<&str> = name.split('_').collect();
    match parts[..] {
        ["k8s", container, pod, namespace, uid, _attempt] => Some(Entry {
            name: value(container),
            pod: value(pod),
            namespace: value(namespace),
            pod_uid: value(uid),
            is_complete: true,
            ..Entry::default()
        }),
        _ => None,
    }
}

/// The config.json of an OCI bundle.
///
/// # Errors
/// It is not such a file.
pub(super) fn oci(text: &[u8]) -> Result<Entry, String> {
    #[derive(Deserialize)]
    struct File {
        #[serde(rename = "ociVersion")]
        _version: String,
        annotations: Option<HashMap<String, Value>>,
    }
    let file: File = json(text)?;
    let annotations = file.annotations.unwrap_or_default();
    let entry = Entry::from_labels(&annotations);
    // containerd before 1.5 writes the type, and no names.
    let is_in_a_pod = annotations.contains_key("io.kubernetes.cri.container-type");
    Ok(Entry {
        is_complete: entry.pod.is_some() || !is_in_a_pod,
        ..entry
    })
}

/// The container `id` from the names in /var/log/containers: `POD_NAMESPACE_CONTAINER-ID.log`.
///
/// The kubelet cuts a name at 255 bytes, first the id. Then at least [`MIN_CUT_ID`] digits of it must be left.
pub(super) fn log_of_container<'n>(
    names: impl IntoIterator<Item = &'n str>,
    id: &str,
) -> Option<Entry> {
    const LONGEST: usize = 255;
    let parse = |name: &str| {
        let stem = name.strip_suffix(".log")?;
        let (rest, end) = stem.rsplit_once('-')?;
        let is_cut = name.len() == LONGEST && end.len() >= MIN_CUT_ID && id.starts_with(end);
        if end != id && !is_cut {
            return None;
        }
        let mut parts = rest.split('_');
        match (parts.next()?, parts.next()?, parts.next()?, parts.next()) {
            (pod, namespace, container, None) => Some(Entry {
                name: value(container),
                pod: value(pod),
                namespace: value(namespace),
                is_complete: true,
                ..Entry::default()
            }),
            _ => None,
        }
    };
    names.into_iter().find_map(parse)
}

/// The pod with this UID from the names in /var/log/pods: `NAMESPACE_POD_UID`. The name of the container stays unknown.
pub(super) fn log_of_pod<'n>(names: impl IntoIterator<Item = &'n str>, uid: &str) -> Option<Entry> {
    let parse = |name: &str| {
        let mut parts = name.strip_suffix(uid)?.strip_suffix('_')?.split('_');
        match (parts.next()?, parts.next()?, parts.next()) {
            (namespace, pod, None) => Some(Entry {
                pod: value(pod),
                namespace: value(namespace),
                ..Entry::default()
            }),
            _ => None,
        }
    };
    names.into_iter().find_map(parse)
}

/// The data root in Docker's daemon.json.
pub(super) fn docker_data_root(text: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct File {
        #[serde(rename = "data-root", alias = "graph")]
        root: Option<String>,
    }
    json::<File>(text)
        .ok()?
        .root
        .filter(|path| is_absolute(path))
}

/// The data root and the configuration file in the arguments of dockerd, which end with zero bytes.
pub(super) fn dockerd_arguments(text: &[u8]) -> (Option<String>, Option<String>) {
    let words: Vec<&str> = text
        .split(|byte| *byte == 0)
        .map(|word| std::str::from_utf8(word).unwrap_or_default())
        .collect();
    let option = |names: &[&str]| {
        words.iter().enumerate().find_map(|(index, word)| {
            let (name, joined) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (*word, None),
            };
            let value = joined.or_else(|| words.get(index + 1).copied());
            let value = value.filter(|_| names.contains(&name))?;
            is_absolute(value).then(|| value.to_owned())
        })
    };
    (
        option(&["--data-root", "--graph", "-g"]),
        option(&["--config-file"]),
    )
}

/// The value of a setting in storage.conf of containers/storage, which is TOML.
pub(super) fn storage_setting(text: &str, wanted: &str) -> Option<String> {
    let value = |line: &str| {
        let (key, value) = line.split_once('=')?;
        let value = value.trim().strip_prefix('"')?.split('"').next()?;
        (key.trim() == wanted && !value.is_empty()).then(|| value.to_owned())
    };
    text.lines().find_map(value)
}

/// A path in storage.conf with its variables, of which the settings for users may have these; `None` if it is no absolute path then.
pub(super) fn with_variables(path: &str, home: &str, uid: u32) -> Option<String> {
    let uid = uid.to_string();
    let path = path
        .replace("${HOME}", home)
        .replace("$HOME", home)
        .replace("${UID}", &uid)
        .replace("$UID", &uid);
    (is_absolute(&path) && !path.contains('$')).then_some(path)
}

/// The home directory of a user in the text of passwd(5).
pub(super) fn home_of(passwd: &str, uid: u32) -> Option<String> {
    let home = |line: &str| {
        let fields: Vec<&str> = line.split(':').collect();
        let is_wanted = fields.len() == 7 && fields[2].parse() == Ok(uid);
        (is_wanted && is_absolute(fields[5])).then(|| fields[5].to_owned())
    };
    passwd.lines().find_map(home)
}

fn is_absolute(path: &str) -> bool {
    path.starts_with('/') && path.len() <= MAX_VALUE
}

/// # Errors
/// Why it is not JSON of this type. The text itself is not quoted: it may be a file that the caller may not read.
fn json<'t, T: Deserialize<'t>>(text: &'t [u8]) -> Result<T, String> {
    use serde_json::error::Category;
    serde_json::from_slice(text).map_err(|error| {
        let what = match error.classify() {
            Category::Eof => "it ends too early",
            Category::Syntax | Category::Io => "it is not JSON",
            Category::Data => "it has not the expected fields",
        };
        format!("{what} (line {}, column {})", error.line(), error.column())
    })
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
