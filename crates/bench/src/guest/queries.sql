-- A table of SIZE rows, an index, joins and groups, in memory.
CREATE TABLE item(id INTEGER PRIMARY KEY, kind INTEGER, weight REAL, name TEXT);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < SIZE)
INSERT INTO item SELECT i, (i * 7919) % 1009, (i % 1000) / 8.0, 'item ' || ((i * 104729) % 99991) FROM n;
CREATE INDEX by_kind ON item(kind);
CREATE TABLE kind(id INTEGER PRIMARY KEY, title TEXT);
INSERT INTO kind SELECT DISTINCT kind, 'kind ' || kind FROM item;
SELECT count(*), sum(weight), min(name), max(name) FROM item;
SELECT title, count(*), sum(weight) FROM item JOIN kind ON item.kind = kind.id GROUP BY title ORDER BY 3 DESC, 1 LIMIT 5;
SELECT count(*) FROM item a JOIN item b ON a.kind = b.kind AND b.id = a.id + 1009;
UPDATE item SET weight = weight * 2 WHERE kind < 100;
SELECT sum(weight), count(DISTINCT name) FROM item;
