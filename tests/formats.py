"""Write annotations in other formats, as users have them: COCO's JSON and YOLO's folders.

write_coco(read_split("VOC2007", "test"), "instances_test.json")
write_yolo({"train": train, "val": validation}, "mine")
"""

import json
import os

from support.images import read_size


def write_coco(annotations, path, image_folder=None, names=None):
    """Write annotations as a JSON file of COCO's; difficult objects become crowds.

    As in COCO's own files, ids have gaps and images are not in the order of their ids.

    :param annotations: list of Annotation
    :param image_folder: which the images' names start from; None for absolute paths
    :param names: of the classes; None for those of the annotations, sorted
    :return: class name -> id of its category
    """
    names = names or sorted({part.name for annotation in annotations for part in annotation.objects})
    category_ids = {name: 3 * index + 7 for index, name in enumerate(names)}
    images, objects = [], []
    for index, annotation in enumerate(annotations):
        image_id = 5 * (len(annotations) - index) + 3
        file_name = os.path.relpath(annotation.image, image_folder) if image_folder else annotation.image
        width, height = read_size(annotation.image)
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for part in annotation.objects:
            x_min, y_min, x_max, y_max = part.box
            width, height = x_max - x_min, y_max - y_min
            objects.append({
                "id": 500 + len(objects), "image_id": image_id, "category_id": category_ids[part.name],
                "bbox": [x_min, y_min, width, height], "area": width * height if part.area is None else part.area,
                "iscrowd": part.difficult,
            })  # fmt: skip
    categories = [{"id": number, "name": name} for name, number in category_ids.items()]
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"images": images, "annotations": objects, "categories": categories}, file)
    return category_ids


def write_yolo(splits, folder, digits=6):
    """Write annotations as a folder of YOLO's, with links to the images; difficulties are lost.

    Names of images begin with their number, so that a reader that sorts them keeps their order.

    :param splits: {"train": list of Annotation, "val": the same, ...}
    :param digits: of the fractions, after the point
    :return: path of the data.yaml
    """
    parts = [part for annotations in splits.values() for annotation in annotations for part in annotation.objects]
    names = sorted({part.name for part in parts})
    for split, annotations in splits.items():
        for part in ("images", "labels"):
            os.makedirs(os.path.join(folder, part, split))
        for index, annotation in enumerate(annotations):
            stem, suffix = os.path.splitext(os.path.basename(annotation.image))
            stem = f"{index:06}_{stem}"
            os.symlink(os.path.abspath(annotation.image), os.path.join(folder, "images", split, stem + suffix))
            width, height = read_size(annotation.image)
            with open(os.path.join(folder, "labels", split, f"{stem}.txt"), "w", encoding="utf-8") as file:
                for part in annotation.objects:
                    x_min, y_min, x_max, y_max = part.box
                    cx, cy = (x_min + x_max) / 2 / width, (y_min + y_max) / 2 / height
                    w, h = (x_max - x_min) / width, (y_max - y_min) / height
                    shares = " ".join(f"{share:.{digits}f}" for share in (cx, cy, w, h))
                    file.write(f"{names.index(part.name)} {shares}\n")
    path = os.path.join(folder, "data.yaml")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{split}: images/{split}\n" for split in splits)
        file.write(f"nc: {len(names)}\nnames: {json.dumps(names)}\n")
    return path


def largest_difference(annotations, others):
    """Compare two lists of annotations of the same images, whatever their formats.

    :return: the largest difference of two coordinates, pixels; and whether all difficulties are the same
    :raises AssertionError: if there is a problem, or the numbers or classes of the objects differ
    """
    assert len(annotations) == len(others)
    largest, same_difficulties = 0, True
    for annotation, other in zip(annotations, others, strict=True):
        assert not annotation.problems, annotation.problems[0]
        assert not other.problems, other.problems[0]
        assert os.path.realpath(annotation.image) == os.path.realpath(other.image)
        assert [part.name for part in annotation.objects] == [part.name for part in other.objects], other.path
        for part, twin in zip(annotation.objects, other.objects, strict=True):
            largest = max([largest, *(abs(a - b) for a, b in zip(part.box, twin.box, strict=True))])
            same_difficulties &= part.difficult == twin.difficult
    return largest, same_difficulties
