def write_report(path, data):
    import json
    path.write_text(json.dumps(data))
