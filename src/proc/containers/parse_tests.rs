//! The files as the runtimes write them, shortened.

use super::*;

const ID: &str = "3f4a9b2c1d0e5f6a7b8c9d0e1f2a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c";
const UID: &str = "8bd1fb9b-72ff-4a6f-8f9e-5d0f3a6c2b17";

/// `name image pod namespace pod_uid compose_service complete`, with `-` for an unknown one.
fn summary(entry: &Entry) -> String {
    let texts = [
        &entry.name,
        &entry.image,
        &entry.pod,
        &entry.namespace,
        &entry.pod_uid,
        &entry.compose_service,
    ];
    let words = texts.map(|text| text.as_deref().unwrap_or("-"));
    format!("{} {}", words.join(" "), entry.is_complete)
}

fn docker_of(text: &str) -> Result<String, String> {
    docker(text.replace("{ID}", ID).as_bytes(), ID).map(|entry| summary(&entry))
}

#[test]
fn docker_puts_a_slash_before_the_name() {
    let plain = r#"{"StreamConfig":{},"State":{"Running":true,"Pid":4711},"ID":"{ID}","Created":"2026-11-28T21:03:11.5Z",
        "Config":{"Hostname":"3f4a9b2c1d0e","Env":["PATH=/bin"],"Cmd":["/leaky-app"],"Image":"leaky:1","Labels":{}},
        "Image":"sha256:9b2c","Name":"/my-leaky-app","Driver":"overlay2","RestartCount":0}"#;
    assert_eq!(
        docker_of(plain).unwrap(),
        "my-leaky-app leaky:1 - - - - true"
    );
    let compose = r#"{"ID":"{ID}","Name":"/shop-web-1","Config":{"Image":"shop_web","Labels":{
        "com.docker.compose.project":"shop","com.docker.compose.service":"web","com.docker.compose.oneoff":"False"}}}"#;
    assert_eq!(
        docker_of(compose).unwrap(),
        "shop-web-1 shop_web - - - web true"
    );
    let kubelet = r#"{"ID":"{ID}","Name":"/k8s_php_web-5c9_shop_8bd1fb9b_0","Config":{"Image":"sha256:1","Labels":{
        "io.kubernetes.container.name":"php","io.kubernetes.pod.name":"web-5c9","io.kubernetes.pod.namespace":"shop",
        "io.kubernetes.pod.uid":"8bd1fb9b"}}}"#;
    assert_eq!(
        docker_of(kubelet).unwrap(),
        "php sha256:1 web-5c9 shop 8bd1fb9b - true"
    );
    let bare = r#"{"ID":"{ID}","Config":null}"#;
    assert_eq!(docker_of(bare).unwrap(), "- - - - - - true");
    let no_labels = r#"{"ID":"{ID}","Name":"/a","Config":{"Labels":null}}"#;
    assert_eq!(docker_of(no_labels).unwrap(), "a - - - - - true");
}

#[test]
fn a_file_that_is_wrong_is_an_error_without_its_text() {
    for (text, why) in [
        ("", "it ends too early"),
        (r#"{"ID":"{ID}","Name":"/a"#, "it ends too early"),
        ("secret", "it is not JSON"),
        ("\u{0}\u{1}", "it is not JSON"),
        (r#"["secret"]"#, "it has not the expected fields"),
        (
            r#"{"ID":"secret","Name":"/a"}"#,
            "it is about another container",
        ),
        (r#"{"ID":7,"Name":"/a"}"#, "it has not the expected fields"),
    ] {
        let error = docker_of(text).unwrap_err();
        assert!(error.starts_with(why), "{text}: {error}");
        assert!(!error.contains("secret"), "{error}");
    }
    assert!(docker(&[b'['; 100_000], ID).is_err(), "very deep");
    assert!(storage(b"{}").is_err() && oci(b"{}").is_err() && oci(b"[]").is_err());
}

#[test]
fn a_long_value_is_no_name() {
    let long = format!(r#"{{"ID":"{ID}","Name":"/{}"}}"#, "x".repeat(2000));
    assert_eq!(docker(long.as_bytes(), ID).unwrap().name, None);
}

#[test]
fn storage_has_one_table_for_all_containers() {
    let text = r#"[
      {"id":"aaaa","names":["my-leaky-app"],"image":"9b2c","layer":"77","metadata":
       "{\"image-name\":\"localhost/leaky:1\",\"image-id\":\"9b2c\",\"name\":\"my-leaky-app\",\"created-at\":1764363791}",
       "created":"2026-11-28T21:03:11Z","flags":{"MountLabel":""}},
      {"id":"bbbb","names":["k8s_php_web-5c9_shop_8bd1fb9b-72ff-4a6f-8f9e-5d0f3a6c2b17_0"],"metadata":
       "{\"pod-name\":\"k8s_web-5c9_shop_8bd1_0\",\"pod-id\":\"77\",\"image-name\":\"docker.io/php:8\",\"container-name\":\"x\"}"},
      {"id":"cccc"},
      {"id":"dddd","names":null,"metadata":"not JSON"}
    ]"#;
    let table = storage(text.as_bytes()).unwrap();
    assert_eq!(
        summary(&table["aaaa"]),
        "my-leaky-app localhost/leaky:1 - - - - true"
    );
    assert_eq!(
        summary(&table["bbbb"]),
        format!("php docker.io/php:8 web-5c9 shop {UID} - true")
    );
    assert_eq!(summary(&table["cccc"]), "- - - - - - true");
    assert_eq!(summary(&table["dddd"]), "- - - - - - true");
    assert!(storage(b"[]").unwrap().is_empty());
}

fn oci_of(annotations: &str) -> String {
    let text = format!(
        r#"{{"ociVersion":"1.1.0","process":{{"args":["php"]}},"root":{{"path":"rootfs"}},"annotations":{annotations}}}"#
    );
    summary(&oci(text.as_bytes()).unwrap())
}

#[test]
fn annotations_of_each_runtime() {
    let containerd = r#"{"io.kubernetes.cri.container-name":"php","io.kubernetes.cri.container-type":"container",
        "io.kubernetes.cri.image-name":"docker.io/library/php:8","io.kubernetes.cri.sandbox-id":"77",
        "io.kubernetes.cri.sandbox-name":"web-5c9","io.kubernetes.cri.sandbox-namespace":"shop",
        "io.kubernetes.cri.sandbox-uid":"8bd1"}"#;
    assert_eq!(
        oci_of(containerd),
        "php docker.io/library/php:8 web-5c9 shop 8bd1 - true"
    );
    let sandbox = r#"{"io.kubernetes.cri.container-type":"sandbox","io.kubernetes.cri.sandbox-name":"web-5c9",
        "io.kubernetes.cri.sandbox-namespace":"shop","io.kubernetes.cri.sandbox-uid":"8bd1"}"#;
    assert_eq!(oci_of(sandbox), "POD - web-5c9 shop 8bd1 - true");
    let old =
        r#"{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"77"}"#;
    assert_eq!(oci_of(old), "- - - - - - false");
    let crio = r#"{"io.kubernetes.container.name":"php","io.kubernetes.cri-o.ContainerType":"container",
        "io.kubernetes.cri-o.ImageName":"docker.io/php:8","io.kubernetes.cri-o.Image":"9b2c",
        "io.kubernetes.pod.name":"web-5c9","io.kubernetes.pod.namespace":"shop","io.kubernetes.pod.uid":"8bd1"}"#;
    assert_eq!(oci_of(crio), "php docker.io/php:8 web-5c9 shop 8bd1 - true");
    let nerdctl = r#"{"nerdctl/name":"my-leaky-app","nerdctl/namespace":"default","com.docker.compose.service":"web"}"#;
    assert_eq!(oci_of(nerdctl), "my-leaky-app - - - - web true");
    assert_eq!(oci_of("null"), "- - - - - - true");
    assert_eq!(
        oci_of(r#"{"io.kubernetes.pod.name":7}"#),
        "- - - - - - true"
    );
}

#[test]
fn names_of_logs() {
    let name = format!("web-5c9_shop_php-{ID}.log");
    let of = |names: &[&str], id: &str| {
        log_of_container(names.iter().copied(), id).map(|entry| summary(&entry))
    };
    let other = format!("api_shop_api-{}.log", ID.replace('3', "4"));
    let php = Some("php - web-5c9 shop - - true".to_owned());
    assert_eq!(of(&[&other, &name], ID), php);
    assert_eq!(of(&[&other, "", "x.log", "-.log"], ID), None);
    assert_eq!(of(&[&name], &ID.replace('3', "4")), None);
    // The kubelet cuts at 255 bytes with the ending.
    let cut = |pod: usize| {
        let stem = format!("{}_shop_php-{ID}", "p".repeat(pod));
        format!("{}.log", &stem[..251.min(stem.len())])
    };
    let entry = |pod| log_of_container([cut(pod).as_str()], ID);
    assert_eq!(entry(200).unwrap().name.as_deref(), Some("php"));
    // `_shop_php-` has 10 bytes, so 8 digits of the id are left.
    assert_eq!(entry(233).unwrap().pod, Some("p".repeat(233)));
    assert_eq!(entry(234), None, "7 digits may be those of another");
    assert_eq!(entry(245), None);
    // Not as long: something else than the kubelet made it.
    assert_eq!(of(&[&format!("web_shop_php-{}.log", &ID[..12])], ID), None);
}

#[test]
fn a_log_directory_names_the_pod_and_not_the_container() {
    let of = |name: &str| log_of_pod([name], UID).map(|entry| summary(&entry));
    let found = of(&format!("shop_web-5c9_{UID}"));
    assert_eq!(found.unwrap(), "- - web-5c9 shop - - false");
    assert_eq!(of(&format!("shop_{UID}")), None);
    assert_eq!(of(UID), None);
    assert_eq!(of("shop_web-5c9_f7c0d7a5"), None);
}

#[test]
fn roots_in_configurations() {
    let root = |text: &str| docker_data_root(text.as_bytes());
    assert_eq!(
        root(r#"{"data-root":"/srv/docker","iptables":false}"#),
        Some("/srv/docker".into())
    );
    assert_eq!(root(r#"{"graph":"/old"}"#), Some("/old".into()));
    assert_eq!(root(r#"{"data-root":"relative"}"#), None);
    assert_eq!(root("{}"), None);
    let of = |words: &[&str]| dockerd_arguments(words.join("\0").as_bytes());
    let (srv, etc) = (Some("/srv".to_owned()), Some("/etc/d.json".to_owned()));
    assert_eq!(
        of(&["dockerd", "--data-root", "/srv", ""]),
        (srv.clone(), None)
    );
    assert_eq!(of(&["dockerd", "--data-root=/srv"]), (srv.clone(), None));
    assert_eq!(
        of(&["dockerd", "-g", "/srv", "--config-file=/etc/d.json"]),
        (srv, etc)
    );
    assert_eq!(of(&["dockerd", "--data-root"]), (None, None));
    assert_eq!(of(&["dockerd", "-H", "fd://"]), (None, None));
    let storage = "[storage]\ndriver = \"overlay\"\n# graphroot = \"/no\"\ngraphroot = \"/srv/storage\" # here\n";
    let setting = |text| storage_setting(text, "graphroot");
    assert_eq!(setting(storage), Some("/srv/storage".into()));
    assert_eq!(setting("graphroot = relative\n"), None);
    let path = |text| with_variables(text, "/home/ann", 1000);
    assert_eq!(path("$HOME/s").as_deref(), Some("/home/ann/s"));
    assert_eq!(path("/srv/${UID}").as_deref(), Some("/srv/1000"));
    assert_eq!(path("relative"), None);
    assert_eq!(path("/srv/$USER"), None, "its value is unknown");
}

#[test]
fn the_home_of_the_user_who_runs_a_container() {
    let passwd =
        "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000:,,,:/home/ann:/bin/sh\nbroken:1001\n";
    assert_eq!(home_of(passwd, 1000), Some("/home/ann".into()));
    assert_eq!(home_of(passwd, 1001), None);
}
