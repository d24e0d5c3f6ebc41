//! The page at `/` in a real browser, before a real server.
#![cfg(feature = "serve")]

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use upcycle::engine::Options;

use crate::{
    serve::Running,
    support::{browser::Page, engines::composite},
};

const ASK: &str = "document.querySelector('#prompt').focus()";
const IDLE: &str = "!document.querySelector('#send.busy')";
const READY: &str = "document.querySelector('#model-name').textContent";
const ANSWER: &str = "[...document.querySelectorAll('article.assistant .body')].at(-1).textContent";

/// A browser at a server's page, once the page knows the model.
fn visit(server: &Running) -> Option<Page> {
    let mut page = Page::new()?;
    page.open(&server.url());
    page.wait(READY);
    Some(page)
}

fn say(page: &mut Page, text: &str) {
    page.eval(ASK);
    page.write(text);
    page.press("Enter");
}

fn set(page: &mut Page, id: &str, value: &str) {
    page.eval(&format!(
        "(field => {{ field.value = {value}; field.dispatchEvent(new Event('input')); }})(document.querySelector('#{id}'))"
    ));
}

/// A stream with this text in chunks of so many characters.
fn stream(text: &str, size: usize) -> String {
    let characters: Vec<char> = text.chars().collect();
    let chunks = characters.chunks(size).map(|piece| json!({"choices": [{"index": 0, "delta": {"content": String::from_iter(piece)}}]}));
    chunks.map(|chunk| format!("data: {chunk}\n\n")).collect::<String>() + "data: [DONE]\n\n"
}

/// Nothing was asked of anybody else, and no script failed.
fn kept_to_itself(page: &mut Page, server: &Running) {
    let strangers: Vec<_> = page.asked().iter().map(|asked| asked.url.clone()).filter(|url| !url.starts_with(&server.url())).collect();
    assert!(strangers.iter().all(|url| url.starts_with("data:") || url.starts_with("blob:")), "{strangers:?}");
    assert_eq!(page.exceptions, [""; 0]);
}

#[test]
fn a_message_is_answered_edited_answered_again_and_kept() {
    let server = Running::start(Options::default());
    let Some(mut page) = visit(&server) else { return };
    assert_eq!(page.eval("document.querySelector('#experts').hidden && document.querySelector('#legend').hidden"), json!(true));
    set(&mut page, "sampling-temperature", "0");
    set(&mut page, "sampling-max_tokens", "12");
    set(&mut page, "sampling-seed", "7");
    set(&mut page, "system", "'Be brief.'");
    say(&mut page, "Compute 12 + 30.");
    page.wait(&format!("document.querySelector('article.assistant') && {IDLE}"));
    let body = page.bodies("/v1/chat/completions").pop().unwrap();
    assert_eq!(
        body,
        json!({
            "model": "math", "stream": true, "stream_options": {"include_usage": true}, "temperature": 0, "max_tokens": 12, "seed": 7,
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Compute 12 + 30."}],
        })
    );
    let expected = server.chat(&json!({"messages": body["messages"], "temperature": 0})).ok();
    let stored = "JSON.parse(localStorage[Object.keys(localStorage).find(key => key.startsWith('upcycle.chat.'))]).messages";
    assert_eq!(page.eval(&format!("{stored}[1].content")), expected["choices"][0]["message"]["content"]);
    let facts = page.text("document.querySelector('.facts').textContent");
    assert!(facts.starts_with("12 tokens") && facts.ends_with("cut off at the limit of tokens"), "{facts}");

    page.click("[aria-label='Edit the message']");
    page.eval("document.querySelector('.editing textarea').select()");
    page.write("Compute 1 + 1.");
    page.press("Enter");
    page.wait(&format!("{IDLE} && {stored}[0].content === 'Compute 1 + 1.'"));
    page.click("[aria-label='Answer again']");
    page.wait(IDLE);
    let bodies = page.bodies("/v1/chat/completions");
    assert_eq!(bodies.len(), 3);
    assert_eq!(bodies[1]["messages"][1]["content"], "Compute 1 + 1.");
    assert_eq!(bodies[1], bodies[2], "what is answered again is the same conversation");

    let before = page.text("document.querySelector('#messages').innerText");
    page.reload();
    page.wait(READY);
    assert_eq!(page.text("document.querySelector('#messages').innerText"), before);
    assert_eq!(page.eval("document.querySelector('#system').value"), json!("Be brief."));

    page.click("[aria-label^=Rename]");
    page.eval("document.querySelector('#chats input').select()");
    page.write("Sums");
    page.press("Enter");
    assert_eq!(page.text("document.querySelector('#chats .open').textContent"), "Sums");
    page.click("[aria-label='Delete Sums']");
    assert_eq!(page.eval("document.querySelectorAll('#chats li, article').length"), json!(0));
    page.click("#toast button");
    assert_eq!(page.eval("[document.querySelectorAll('#chats li').length, document.querySelectorAll('article').length]"), json!([1, 2]));
    kept_to_itself(&mut page, &server);
}

#[test]
fn an_answer_streams_in_and_stops() {
    let server = Running::start(Options::default());
    let Some(mut page) = visit(&server) else { return };
    set(&mut page, "sampling-temperature", "2");
    let slowly = json!({"offline": false, "latency": 0, "downloadThroughput": 3000, "uploadThroughput": 1e6});
    page.call("Network.emulateNetworkConditions", &slowly);
    say(&mut page, "Compute 12 + 30.");
    page.wait(&format!("document.querySelector('article.assistant') && {ANSWER}.length > 10"));
    assert_eq!(page.eval(IDLE), json!(false));
    let some = page.text(ANSWER);
    page.wait(&format!("{ANSWER}.length > {}", some.len()));
    assert!(page.text(ANSWER).starts_with(some.trim_end()));
    page.press("Escape");
    page.wait(IDLE);
    assert_eq!(page.text("document.querySelector('.facts').textContent"), "stopped");
    assert_eq!(page.text("document.querySelector('#status').textContent"), "Stopped");
    assert_eq!(page.eval("document.activeElement.id"), json!("prompt"));
    kept_to_itself(&mut page, &server);
}

#[test]
fn markdown_is_shown_and_nothing_in_it_runs() {
    let server = Running::start(Options::default());
    let Some(mut page) = visit(&server) else { return };
    let mut answers = |text: &str| {
        page.can("/v1/chat/completions", 200, stream(text, 7));
        page.click("#new");
        say(&mut page, text);
        page.wait(&format!("document.querySelector('article.assistant') && {IDLE}"));
        page.text("(node => { node.querySelectorAll('figcaption').forEach(own => own.remove()); return node.outerHTML; })(document.querySelector('.assistant .body').cloneNode(true))")
    };
    for (markdown, html) in [
        (
            "a **b *c*** `d*` _e_ f_g_h ~~i~~ 2 * 3 * 4",
            "<p>a <strong>b <em>c</em></strong> <code>d*</code> <em>e</em> f_g_h <del>i</del> 2 * 3 * 4</p>",
        ),
        (
            "# A #\n\n- b\n  1. c\n- d\n\n---\n> e\n> f",
            "<h3>A #</h3><ul><li>b<ol start=\"1\"><li>c</li></ol></li><li>d</li></ul><hr><blockquote><p>e<br>f</p></blockquote>",
        ),
        (
            "| a | b |\n|--:|---|\n| `1\\|2` | **3** |\n",
            "<div class=\"table\" tabindex=\"0\"><table><thead><tr><th class=\"right\" scope=\"col\">a</th><th scope=\"col\">b</th></tr></thead><tbody><tr><td class=\"right\"><code>1\\|2</code></td><td><strong>3</strong></td></tr></tbody></table></div>",
        ),
        (
            "```python\nif f(1): # c\n```\nrest",
            "<figure class=\"code\"><pre tabindex=\"0\"><code><span class=\"hl-keyword\">if</span> <span class=\"hl-call\">f</span>(<span class=\"hl-number\">1</span>): <span class=\"hl-comment\"># c</span></code></pre></figure><p>rest</p>",
        ),
        ("\\*a\\* * b", "<p>*a* * b</p>"),
        ("```\nnever closed", "<figure class=\"code\"><pre tabindex=\"0\"><code>never closed</code></pre></figure>"),
    ] {
        assert_eq!(answers(markdown), format!("<div class=\"body\">{html}</div>"));
    }
    let link = answers("[a *b*](https://example.org/x_(y)) <https://example.org>.");
    assert!(!link.contains("&lt;"), "{link}");
    assert_eq!(link.matches("<a href=\"https://example.org/").count(), 2, "{link}");
    assert_eq!(link.matches("target=\"_blank\" rel=\"noopener noreferrer\"").count(), 2, "{link}");

    let evil = [
        "<img src=x onerror='window.hit=1'>",
        "<script>window.hit=2</script>",
        "[a](javascript:window.hit=3) [b](JaVaScRiPt:window.hit=3) [c](data:text/html,<script>window.hit=3</script>) [d](vbscript:x)",
        "![e](https://example.org/track.png) ![f](x\" onerror=\"window.hit=4)",
        "```html\" onmouseover=\"window.hit=5\n</code></pre><script>window.hit=5</script>\n```",
        "| <svg onload=window.hit=6> | b |\n|---|---|\n| <iframe srcdoc='<script>top.hit=6</script>'> | c |",
        "<a href=\"javascript:window.hit=7\">g</a> &lt;script&gt; &#60;b&#62;",
    ];
    let html = answers(&evil.join("\n\n"));
    assert!(html.contains("&lt;img src=x onerror='window.hit=1'&gt;"), "what looks like markup is text: {html}");
    let found =
        page.eval("[...document.querySelectorAll('#messages :is(img, script, iframe, svg[onload], [onerror], [onmouseover])')].length");
    assert_eq!(found, json!(0), "{html}");
    assert_eq!(page.eval("[...document.querySelectorAll('#messages a')].map(a => a.protocol)"), json!(["https:"]));
    page.eval("document.querySelectorAll('#messages span').forEach(span => span.click())");
    // The policy stands behind it: even a script of the page could not.
    let blocked = "(() => { try { document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.hit=8>'); return false; } catch { return true; } })()";
    assert_eq!(page.eval(blocked), json!(true));
    page.eval("document.body.append(Object.assign(document.createElement('a'), { href: 'javascript:window.hit=9' })); document.body.lastChild.click()");
    page.eval("new Promise(done => setTimeout(done, 100))");
    assert_eq!(page.eval("window.hit ?? null"), Value::Null);
    kept_to_itself(&mut page, &server);

    // What is nested or never closed without end takes its time, not for ever.
    let endless = [("> ", 9_000), ("*a ", 9_000), ("[", 9_000), ("`", 9_001), ("**a *b ", 5_000), ("- a\n", 2_000), ("[a](", 5_000)];
    let text = endless.map(|(text, n)| text.repeat(n)).join("\n\n");
    page.can("/v1/chat/completions", 200, stream(&text, text.len()));
    let start = Instant::now();
    say(&mut page, "a");
    page.wait(&format!("document.querySelectorAll('article').length === 4 && {IDLE}"));
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn a_keyboard_is_enough() {
    let server = Running::start(Options::default());
    let Some(mut page) = visit(&server) else { return };
    set(&mut page, "sampling-max_tokens", "8");
    say(&mut page, "Compute 12 + 30.");
    page.wait(&format!("document.querySelector('article.assistant') && {IDLE}"));
    page.eval("document.querySelector('.skip').focus()");
    assert_eq!(page.eval("document.querySelector('.skip').getBoundingClientRect().top >= 0"), json!(true));
    page.press("Enter");
    assert_eq!(page.text("document.activeElement.id"), "prompt");

    // Once around: every control has its turn, a name, and shows that it has the focus.
    page.eval("document.querySelector('.skip').focus()");
    let mut turns = Vec::new();
    let look = "(node => [node.id || node.getAttribute('aria-label') || node.textContent, getComputedStyle(node).outlineStyle !== 'none' || node === document.body, \
                Boolean(node.getAttribute('aria-label') || node.textContent.trim() || node.labels?.length)])(document.activeElement)";
    loop {
        page.press("Tab");
        let Value::Array(turn) = page.eval(look) else { panic!() };
        let name = turn[0].as_str().unwrap().to_owned();
        if page.eval("document.activeElement === document.body || document.activeElement.className === 'skip'") == json!(true) {
            break;
        }
        assert_eq!(turn[1..], [json!(true), json!(true)], "{name}: visible focus, name");
        turns.push(name);
        assert!(turns.len() < 100, "{turns:?}");
    }
    let order = [
        "new",
        "Compute 12 + 30.",
        "Delete Compute 12 + 30.",
        "export-all",
        "toggle-history",
        "theme",
        "toggle-controls",
        "Copy the message",
        "Edit the message",
        "Answer again",
        "prompt",
        "send",
        "system",
        "sampling-temperature",
        "sampling-seed",
        "key",
    ];
    let places: Vec<_> =
        order.iter().map(|name| turns.iter().position(|turn| turn == name).unwrap_or_else(|| panic!("{name}: {turns:?}"))).collect();
    assert!(places.is_sorted(), "{places:?} {turns:?}");

    page.eval("document.querySelector('#theme').focus()");
    page.press("Space");
    assert_eq!(page.text("document.documentElement.dataset.theme"), "light");
    page.press("Enter");
    assert_eq!(page.text("document.documentElement.dataset.theme"), "dark");
    page.eval("document.querySelector('[aria-label=\"Edit the message\"]').focus()");
    page.press("Enter");
    assert_eq!(page.text("document.activeElement.getAttribute('aria-label')"), "Edit the message");
    page.press("Escape");
    assert_eq!(
        (page.text("document.activeElement.id"), page.eval("document.querySelectorAll('.editing').length")),
        ("prompt".into(), json!(0))
    );
    kept_to_itself(&mut page, &server);
}

#[test]
fn errors_are_in_the_servers_words_and_a_key_is_asked_for() {
    let server = Running::start(Options::default());
    let Some(mut page) = visit(&server) else { return };
    set(&mut page, "sampling-top_p", "9");
    say(&mut page, "a");
    page.wait("document.querySelector('.error')");
    let words = server.chat(&json!({"top_p": 9})).error().2;
    assert_eq!(page.text("document.querySelector('.error p').textContent"), words);
    set(&mut page, "sampling-top_p", "'0.9'");
    set(&mut page, "sampling-max_tokens", "4");
    page.click(".error button");
    page.wait(&format!("{IDLE} && !document.querySelector('.error') && {ANSWER}"));

    let refusal =
        json!({"error": {"message": "no key, no answer", "type": "authentication_error", "param": null, "code": null}}).to_string();
    page.can("/v1/models", 401, refusal);
    page.reload();
    page.wait("document.querySelector('#key-dialog')?.open");
    assert!(page.text("document.querySelector('#key-dialog').textContent").contains("no key, no answer"));
    page.can_nothing();
    page.write("secret");
    page.press("Enter");
    page.wait(READY);
    assert_eq!(page.asked().last().unwrap().authorization.as_deref(), Some("Bearer secret"));
    page.can("/v1/chat/completions", 200, "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"half\"}}]}\n\n");
    say(&mut page, "b");
    page.wait("document.querySelector('.error')");
    assert_eq!(page.text("document.querySelector('.error p').textContent"), "The connection ended before the answer did.");
    assert_eq!(page.text(ANSWER), "half");
    kept_to_itself(&mut page, &server);
}

#[test]
fn experts_are_seen_and_steered() {
    let server = Running::over(composite(Options::default()));
    let Some(mut page) = visit(&server) else { return };
    page.wait("document.querySelector('#heat')");
    let names = page.eval("[...document.querySelectorAll('.experts b')].map(name => name.textContent)");
    assert_eq!(names, json!(["code", "bible", "german", "math"]));
    assert_eq!(page.eval("[...document.querySelectorAll('#legend li')].map(name => name.textContent)"), names);
    page.wait("document.querySelector('#heat').textContent === 'Nothing has been routed yet.'");
    set(&mut page, "sampling-temperature", "0");
    set(&mut page, "sampling-max_tokens", "16");
    let answer = |page: &mut Page, before: &str| {
        page.eval(before);
        page.click("#new");
        say(page, "Compute 12 + 30.");
        page.wait(&format!("document.querySelector('article.assistant') && {IDLE}"));
        let body = page.bodies("/v1/chat/completions").pop().unwrap();
        let steering = ["expert_bias", "mask_experts", "force_experts", "experts_per_token"].map(|field| body[field].clone());
        (steering, page.text("document.querySelector('.facts').textContent"))
    };
    let button = |expert: &str| format!("document.querySelector(\"[aria-label='{expert}']\").click()");
    let nothing = Value::Null;

    let (steering, plain) = answer(&mut page, "");
    assert_eq!(steering, [&nothing; 4].map(Clone::clone));
    assert!(plain.contains(" %, ") && plain.contains("16 tokens"), "several spoke: {plain}");
    // Every character of the answer has its speaker, and colours change no text.
    let coloured = "[...document.querySelectorAll('.assistant .tok')].map(token => token.textContent).join('')";
    let text = page.text(ANSWER);
    assert_eq!(page.text(coloured), text);
    page.click("#colours");
    assert_eq!((page.text(coloured), page.text(ANSWER)), (String::new(), text));
    page.click("#colours");
    let layers = server.get("/v1/experts").ok()["layers"].as_array().unwrap().len();
    page.wait(&format!("document.querySelectorAll('#heat td').length === {}", 4 * layers));

    let (steering, facts) = answer(&mut page, &button("Choose only german"));
    assert_eq!(steering, [nothing.clone(), nothing.clone(), json!(["german"]), nothing.clone()]);
    assert!(facts.starts_with("german 100 % · "), "{facts}");
    page.eval(&button("Choose only german"));
    let (steering, facts) = answer(&mut page, &button("Never choose math"));
    assert_eq!(steering, [nothing.clone(), json!(["math"]), nothing.clone(), nothing.clone()]);
    assert!(!facts.contains("math"), "{facts}");
    page.eval("document.querySelector(\"[aria-label='Bias of bible']\").focus()");
    page.press("ArrowRight");
    let (steering, _) = answer(&mut page, "");
    assert_eq!(steering[0], json!({"bible": 0.5}));
    set(&mut page, "experts-per-token", "1");
    let (steering, _) = answer(&mut page, "");
    assert_eq!(steering[3], json!(1));
    page.reload();
    page.wait("document.querySelector('#heat')");
    assert_eq!(page.eval("document.querySelector('[aria-pressed=true]').getAttribute('aria-label')"), json!("Never choose math"));
    set(&mut page, "experts-per-token", "9");
    page.eval(ASK);
    page.write("a");
    page.press("Enter");
    page.wait("document.querySelector('.error')");
    let words = server.chat(&json!({"experts_per_token": 9})).error().2;
    assert_eq!(page.text("document.querySelector('.error p').textContent"), words);
    let reset = "[...document.querySelectorAll('#experts button')].at(-1).click()";
    let (steering, facts) = answer(&mut page, reset);
    assert_eq!((steering, facts.split(" · ").next()), ([&nothing; 4].map(Clone::clone), plain.split(" · ").next()));

    let polls =
        |page: &mut Page| page.asked().iter().filter(|asked| asked.url.contains("/v1/experts") && asked.url.contains("load=false")).count();
    let before = polls(&mut page);
    std::thread::sleep(Duration::from_millis(2500));
    assert!(polls(&mut page) > before, "the load is live");
    page.click("#toggle-controls");
    let before = polls(&mut page);
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(polls(&mut page), before, "nobody sees the load");
    kept_to_itself(&mut page, &server);
}

#[test]
fn a_page_before_its_model_waits_for_it() {
    let server = Running::loading("base");
    let Some(mut page) = Page::new() else { return };
    page.open(&server.url());
    page.wait("document.querySelector('.welcome p').textContent === 'the model is being loaded'");
    server.open();
    page.wait(&format!("{READY} === 'base'"));
}
