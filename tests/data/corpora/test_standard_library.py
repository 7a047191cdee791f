from performer_lm.data.corpora.standard_library import StandardLibrary


def test_the_standard_library_is_sorted_source_without_tests():
    corpus = StandardLibrary()
    names = [document.name for document in corpus.documents()]
    assert names == sorted(names)
    assert {"json/decoder.py", "os.py"} <= set(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "dist-packages", "encodings", "idlelib", "__pycache__"}
    assert not any(name.startswith(("_sysconfigdata", "config-")) for name in names)
    assert corpus.place("os.py").endswith("/os.py")
